"""BYOL and SimSiam collapse without their predictor or their stopped gradient, and `evals.collapse` sees it."""

import flax.linen as nn
import jax
import pytest
from experiments import CONFIGS

from sslx import evals, state, train
from sslx.evals import collapse
from sslx.experiment import build
from sslx.models import heads
from sslx.objectives import byol, simsiam, teacher
from sslx.objectives.joint import Tower
from sslx.views.image import to_float

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
    if name == "byol":
        conf.objective.momentum = (0.9, 0.9)
    made = []
    monkeypatch.setattr(method, "Tower", lambda *args: made.append(Tower(*args)) or made[-1])
    if ablation:
        ablation(method, monkeypatch)
    built = build(conf, jax.devices()[:1])
    tower = Tower(made[0].backbone, {"projector": made[0].heads["projector"]})

    def projections(params, aux, batch):
        return tower(tower.of(params), tower.of(aux["stats"]), to_float(batch["image"]))[0]["projector"]

    with jax.set_mesh(built.mesh):
        batches = built.batches(0, STEPS)
        current = state.create(built.objective, built.optimizer, 0, next(batches)[0])
        step = train.train_step(built.objective, built.optimizer, 0)
        for batch, _ in batches:
            current, _ = step(current, batch)
        monitor = evals.assemble({"collapse": collapse.make()}, {"test": built.source},
                                 built.objective._replace(encode=projections), built.mesh, batch_size=512)
        found = monitor.evaluate(current.params, current.aux)
    assert found["collapsed"] == (ablation is not None), found
