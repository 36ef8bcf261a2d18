"""BYOL and SimSiam collapse without their predictor or their stopped gradient, and `evals.collapse` sees it."""

import flax.linen as nn
import jax
import pytest
from experiments import CONFIGS

from sslx import state, train
from sslx.experiment import build
from sslx.models import heads
from sslx.objectives import byol, simsiam, teacher

STEPS, METHODS = 400, {"byol": byol, "simsiam": simsiam}


class Nothing(nn.Module):
    """In place of a predictor."""

    @nn.compact
    def __call__(self, x, *, train):
        return x


def without_predictor(method, patch):
    def projector(*args, bias=False, **options):  # it alone has a bias in its last layer
        return Nothing() if bias else heads.Projector(*args, **options)

    patch.setattr(method, "Projector", projector)


def without_stopped_gradient(method, patch):
    """The target is the network itself, and learns too."""
    patch.setattr(jax.lax, "stop_gradient", lambda x: x)
    patch.setattr(teacher, "moving_average", lambda old, new, momentum: new)


@pytest.mark.parametrize("ablation", [None, without_predictor, without_stopped_gradient])
@pytest.mark.parametrize("name", METHODS)
def test_projections_collapse_without_what_prevents_it(name, ablation, monkeypatch):
    conf, method = CONFIGS[f"{name}_fashion_mnist"].copy_and_resolve_references(), METHODS[name]
    conf.mesh, conf.data.batch_size, conf.objective.features = dict(data=1), 64, 32
    conf.optim.update(learning_rate=0.01, schedule="constant", warmup=0)
    conf.run.steps = conf.optim.steps = STEPS
    digits = dict(name="digits", split="test")
    conf.evals = dict(batch_size=512, labelled=dict(test=digits), collapse=dict(of="projections"))
    if name == "byol":
        conf.objective.update(steps=STEPS, momentum=(0.9, 0.9))
    if ablation:
        ablation(method, monkeypatch)
    built = build(conf, jax.devices()[:1])
    with jax.set_mesh(built.mesh):
        batches = built.batches(0, STEPS)
        current = state.create(built.objective, built.optimizer, 0, next(batches)[0])
        step = train.train_step(built.objective, built.optimizer, 0)
        for batch, _ in batches:
            current, _ = step(current, batch)
        found = built.evaluation.evaluate(current.params, current.aux)
    assert found["collapsed"] == (ablation is not None), found
