"""A step that goes wrong in a real run: it ends, leaves the step out, or goes back, as the config says."""


import command
import numpy as np
import pytest
from runs import assert_identical, examples, newest_step, points, saved_state

from sslx import log

BAD, STEPS, SAVE_EVERY = 20, 24, 8
FLAGS = ("--config.run.log_every=1", f"--config.run.save_every={SAVE_EVERY}", "--config.run.record_examples=True")

# The loss knows its step by the key it is given.
POISONED = """
    import functools, jax, jax.numpy as jnp
    from sslx.objectives import causal_lm
    make = causal_lm.make

    @functools.wraps(make)
    def poisoned(*arguments, **options):
        objective = make(*arguments, **options)

        def loss(params, aux, batch, key):
            steps = {steps}
            keys = [jax.random.key_data(jax.random.fold_in(jax.random.key(config.run.seed), s - 1)) for s in steps]
            bad = jnp.stack([(jax.random.key_data(key) == k).all() for k in keys]).any()
            value, (aux, metrics) = objective.loss(params, aux, batch, key)
            value = value * jnp.where(bad, {factor}, 1.0)
            return value, (aux, metrics | dict(loss=value))

        return objective._replace(loss=loss)

    causal_lm.make = poisoned
"""
FACTORS = {"nan": "jnp.nan", "spike": "100.0"}


def poisoned(folder, kind, steps=(BAD,)):
    folder.mkdir(exist_ok=True)
    text = POISONED.format(steps=list(steps), factor=FACTORS[kind])
    return command.variant(folder, "quickstart", text.strip())


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The workdir of a run in which nothing goes wrong."""
    workdir = tmp_path_factory.mktemp("sound") / "w"
    config = command.CONFIGS / "quickstart.py:debug"
    status, _, err = command.run("--config", config, *FLAGS, "--workdir", workdir)
    assert status == 0, err
    return workdir


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_the_run_ends_finite_without_the_bad_step(kind, action, sound, tmp_path):
    flags = (*FLAGS, f"--config.run.on_bad_step={action}", "--config.run.spike=6.0", "--workdir", tmp_path / "w")
    status, out, err = command.run("--config", poisoned(tmp_path, kind), *flags)
    assert status == 0, err
    for name, x in saved_state(tmp_path / "w").items():
        assert "recent" in name or np.isfinite(x).all(), name
    assert examples(tmp_path / "w") == examples(sound)  # what is passed over is still read: nothing moves

    event, = [e for e in log.events(tmp_path / "w") if e["event"] != "resumed"]
    found, expected = points(tmp_path / "w"), points(sound)
    last = found[STEPS, "eval"]
    what = "is not finite" if kind == "nan" else "above"
    assert f"the loss of step {BAD}" in event["why"] and what in event["why"]
    if action == "skip":
        assert (event["event"], event["step"], event["batch"]) == ("skipped", BAD, BAD - 1)
        assert {k: found[k] for k in found if k[0] < BAD} == {k: expected[k] for k in expected if k[0] < BAD}
        assert last["examples"] == expected[STEPS, "eval"]["examples"]
    else:
        assert (event["event"], event["step"], event["bad_step"]) == ("rolled back", 16, BAD)
        assert event["passed_over"] == [BAD - 1, BAD] and event["lost_s"] > 0
        assert f"rolled back to step 16; steps {BAD - 1} to {BAD} are passed over" in out
        used = set(range(1, STEPS + 1)) - {BAD - 1, BAD}
        assert {step for step, split in found if split == "train"} == used
        assert {k: found[k] for k in found if k[0] < BAD - 1} == {k: expected[k] for k in expected if k[0] < BAD - 1}
        batch = expected[STEPS, "eval"]["examples"] // STEPS
        tokens = expected[STEPS, "eval"]["tokens_seen"] // STEPS
        assert (last["examples"], last["tokens_seen"]) == (len(used) * batch, len(used) * tokens)


def test_a_run_that_rolled_back_is_killed_and_ends_identically(tmp_path):
    """What is passed over survives the process that found it out."""
    line = ["--config", poisoned(tmp_path, "nan", (12,)), *FLAGS, "--config.run.on_bad_step=rollback"]
    assert command.run(*line, "--workdir", tmp_path / "whole")[0] == 0
    command.kill(line, tmp_path / "killed", lambda: newest_step(tmp_path / "killed") >= 14)
    status, out, _ = command.run(*line, "--workdir", tmp_path / "killed")
    assert status == 0 and "rolled back" not in out.split("resumed at step")[1]
    assert_identical(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(("action", "steps", "words"), [
    ("stop", (BAD,), ("the loss of step 20 is not finite", "checkpoint is of step 16", "run.on_bad_step='skip'")),
    ("skip", (5, 7, 10), ("the loss of step 10 is not finite", "More than run.max_bad_steps")),
    ("rollback", (5, 7, 10), ("the loss of step 10 is not finite", "More than run.max_bad_steps")),
])
def test_a_run_that_cannot_go_on_says_why(action, steps, words, tmp_path):
    flags = (*FLAGS, f"--config.run.on_bad_step={action}", "--config.run.max_bad_steps=2", "--workdir", tmp_path / "w")
    status, _, err = command.run("--config", poisoned(tmp_path, "nan", steps), *flags)
    assert status == 3 and "Traceback" not in err
    assert all(word in err for word in words), err


FLICKERING = """
    import functools, jax, numpy as np
    from sslx.objectives import causal_lm
    make, calls = causal_lm.make, []

    def factor(step):
        calls.append(step)
        return np.float32(1.001 if len(calls) == 7 else 1)

    @functools.wraps(make)
    def flickering(*arguments, **options):
        objective = make(*arguments, **options)

        def loss(params, aux, batch, key):
            value, rest = objective.loss(params, aux, batch, key)
            seen = jax.pure_callback(factor, jax.ShapeDtypeStruct((), "float32"), jax.random.key_data(key))
            return value * seen, rest

        return objective._replace(loss=loss)

    causal_lm.make = flickering
    config.evals = {}
"""


@pytest.mark.parametrize("every", [1, 100])
def test_a_step_computed_twice_finds_a_device_that_computes_wrong(every, tmp_path):
    """The 7th product on this device is wrong by a thousandth: found if each step is computed twice, else not."""
    config = command.variant(tmp_path, "quickstart", FLICKERING.strip())
    status, _, err = command.run("--config", config, f"--config.run.recompute_every={every}", "--workdir",
                                 tmp_path / "w", "--config.run.check_replicas_every=5")
    assert (status, "computed twice, gives other bits in" in err) == ((5, True) if every == 1 else (0, False)), err


def test_collapsed_features_raise_an_alarm_or_end_the_run(tmp_path):
    """The alarm is set so high that any features sound it."""
    edit = ("config.evals = dict(heldout=config.evals.heldout, batch_size=32,"
            " collapse=dict(split='heldout', rows=64, min_rankme=1e6))")
    config = command.variant(tmp_path, "quickstart", edit)
    for action, expected in (("warn", 0), ("stop", 3)):
        workdir = tmp_path / action
        status, out, err = command.run("--config", config, f"--config.run.on_collapse={action}",
                                       "--config.run.steps=4", "--config.run.eval_every=2", "--config.optim.steps=4",
                                       "--config.optim.warmup=1", "--workdir", workdir)
        assert status == expected, err
        alarms = [e for e in log.events(workdir) if e["event"] == "collapsed"]
        assert [e["step"] for e in alarms] == ([2, 4] if action == "warn" else [2])
        assert alarms[0]["rankme"] > 0 and ("features of step 2 are collapsed" in err) == (action == "stop")
