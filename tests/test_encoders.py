"""A run begins with the encoder of another, locked or to train on; what does not fit is refused."""

import shutil

import jax
import numpy as np
import pytest
from experiments import CONFIGS, abstract_state, experiment, first_batch
from runs import saved_state

from sslx import config, encoders, state, train
from sslx.config import UserError
from sslx.experiment import Run

STEPS = 2
STUDENT = {"params": "['params']['encoder']", "stats": "['aux']['stats']['encoder']"}
TEACHER = {"params": "['aux']['teacher']['params']['encoder']", "stats": "['aux']['teacher']['stats']['encoder']"}
LOCKED = {"params": "['aux']['locked']['encoder']", "stats": "['aux']['stats']['encoder']"}


def trained(name, workdir, **changes):
    """The last checkpoint of a few steps of a config, with changes of fields a.b, written a__b."""
    short = {"run.steps": STEPS, "optim.steps": STEPS, "optim.warmup": 0, "run.eval_first": False}
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    train.run(config.changed(CONFIGS[name], short | changes), str(workdir))
    return saved_state(workdir)


def encoder(flat, where):
    """{name: value}, of parameters and of statistics, in a flat state."""
    found = {(kind, path.removeprefix(root)): x for kind, root in where.items() for path, x in flat.items()
             if path.startswith(root)}
    assert len({kind for kind, _ in found}) == 2 and len(found) > 10
    return found


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        np.testing.assert_array_equal(x, theirs[name], err_msg=str(name))


@pytest.fixture(scope="module")
def byol(tmp_path_factory):
    """(workdir, last state) of a run with a student and a teacher."""
    workdir = tmp_path_factory.mktemp("runs") / "byol"
    return workdir, trained("byol_fashion_mnist", workdir)


def test_a_locked_tower_stays_that_of_the_other_run(byol, tmp_path):
    """Parameters and statistics, to the bit, while all else moves; it is resumed, and the other run may be gone."""
    other = shutil.copytree(byol[0], tmp_path / "byol")
    start = {"objective__locked": True, "run__encoder_from": str(other), "run__save_every": 1, "run__keep": 9}
    last = trained("clip_openmoji", tmp_path / "lit", **start)
    assert_same(encoder(last, LOCKED), encoder(byol[1], STUDENT))
    assert not any(path.startswith("['params']['encoder']") for path in last)
    for lost in (other, tmp_path / "lit" / "checkpoints" / str(STEPS)):
        shutil.rmtree(lost)
    assert_same(trained("clip_openmoji", tmp_path / "lit", **start), last)


@pytest.mark.parametrize("of_which, source", [("student", STUDENT), ("teacher", TEACHER)])
@pytest.mark.parametrize("name", ["simclr_fashion_mnist", "moco_fashion_mnist", "rotation_fashion_mnist"])
def test_an_encoder_is_adopted_by_students_and_teachers_on_any_mesh(byol, name, of_which, source):
    built = experiment(name, (2, 2, 2), stages=(1,))
    with jax.set_mesh(built.mesh):
        batch = first_batch(built)
        born = state.create(built.objective, built.optimizer, 0, batch)
        run = Run(steps=STEPS, encoder_from=str(byol[0]), encoder_of=of_which)
        other = encoders.encoder_of(run, abstract_state(built, batch))
        adopted = other.adopted(born)
        for old, new in zip(jax.tree.leaves(born), jax.tree.leaves(adopted), strict=True):
            assert (new.shape, new.dtype) == (old.shape, old.dtype)
            assert new.sharding.is_equivalent_to(old.sharding, new.ndim)
        flat = {jax.tree_util.keystr(path): np.asarray(x)
                for path, x in jax.tree_util.tree_leaves_with_path(adopted._asdict())}
        train.train_step(built.objective, built.optimizer, 0)(adopted, batch)  # which takes the memory of its state
    assert_same(encoder(flat, STUDENT), encoder(byol[1], source))
    if name == "moco_fashion_mnist":
        assert_same(encoder(flat, TEACHER), encoder(byol[1], source))


@pytest.mark.parametrize("name, changes, run, words", [
    ("clip_openmoji", {"objective.locked": True}, None, "locked=True takes the image tower of another run"),
    ("simclr_fashion_mnist", {}, dict(encoder_from="nowhere"), "encoder_from='nowhere' is no workdir of a run"),
    ("simclr_fashion_mnist", {}, dict(encoder_step=7), "no checkpoint of step 7; it has 2"),
    ("simclr_fashion_mnist", {"model.width": 16}, {}, "is of shape .8,. there and of shape .16,. here"),
    ("rotation_fashion_mnist", {}, {}, "is missing there and of shape"),
    ("quickstart", {}, {}, "no encoder to begin with"),
])
def test_what_does_not_fit_is_refused(byol, tmp_path, name, changes, run, words):
    line = {} if run is None else {"run.encoder_from": str(byol[0])} | {f"run.{key}": x for key, x in run.items()}
    with pytest.raises(UserError, match=words):
        train.run(config.changed(CONFIGS[name], changes | line), str(tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()


def test_a_run_without_a_teacher_has_none(tmp_path):
    trained("rotation_fashion_mnist", tmp_path / "rotation")
    built = experiment("simclr_fashion_mnist")
    with jax.set_mesh(built.mesh), pytest.raises(UserError, match="no encoder of a teacher"):
        encoders.encoder_of(Run(steps=STEPS, encoder_from=str(tmp_path / "rotation"), encoder_of="teacher"),
                            abstract_state(built, first_batch(built)))
