"""Weights kept in bfloat16: training, sharding and resuming are what they are in float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import AXES, CONFIGS, abstract_state, first_batch

from sslx import state, train
from sslx.checkpoint import Checkpoints
from sslx.experiment import build

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Run:
    """Steps of a tiny language model on one batch, compiled once."""

    def __init__(self, parameters: str, shape: tuple[int, ...]):
        conf = CONFIGS["quickstart"].copy_and_resolve_references()
        conf.mesh = dict(zip(AXES, shape, strict=False))
        conf.optim.update(parameters=parameters, warmup=0)
        self.built = built = build(conf, jax.devices()[:math.prod(shape)])
        with jax.set_mesh(built.mesh):
            self.batch = first_batch(built)
            self.born = jax.jit(lambda batch: state.create(built.objective, built.optimizer, 0, batch))
            self.step = train.train_step(built.objective, built.optimizer, 0)

    def start(self):
        with jax.set_mesh(self.built.mesh):
            return self.born(self.batch)

    def advance(self, current, steps: int):
        """(state after so many more steps, their losses)."""
        losses = []
        with jax.set_mesh(self.built.mesh):
            for _ in range(steps):
                current, metrics = self.step(current, self.batch)
                losses.append(float(metrics["loss"]))
        return current, losses


@pytest.fixture(scope="module")
def alone():
    """On one device."""
    return Run("bfloat16", (1, 1, 1))


@pytest.fixture(scope="module")
def after_three(alone):
    """The state after three steps on one device, on the host."""
    return jax.device_get(alone.advance(alone.start(), 3)[0])


def test_loss_falls_as_in_float32(alone):
    reference = Run("float32", (1, 1, 1))
    losses = np.array([run.advance(run.start(), 24)[1] for run in (alone, reference)])
    (first, *_, narrow), (_, *_, wide) = losses
    assert wide < first - 1 and abs(narrow - wide) < 0.03 * (first - wide), losses


def differing(one, other) -> float:
    """The share of the bfloat16 weights of two states that are not the same."""
    pairs = [(x, y) for x, y in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True)
             if x.dtype == jnp.bfloat16]
    return sum((x != y).sum() for x, y in pairs) / sum(x.size for x, _ in pairs)


def test_rounding_depends_on_the_step_and_not_on_the_mesh(alone, after_three):
    """Sums in another order lead to a few other weights, other random numbers to most of them."""
    sharded = Run("bfloat16", (2, 2, 2))
    elsewhere = jax.device_get(sharded.advance(sharded.start(), 3)[0])
    with jax.set_mesh(alone.built.mesh):
        later = alone.start()._replace(step=jnp.int32(100))
    redrawn = jax.device_get(alone.advance(later, 3)[0])
    assert differing(elsewhere, after_three) < 0.05 < 0.5 < differing(redrawn, after_three)


def test_resume_is_identical_to_the_bit(alone, after_three, tmp_path):
    saved = Checkpoints(tmp_path, keep=1)
    saved.save(alone.advance(alone.start(), 2)[0])
    saved.close()
    with jax.set_mesh(alone.built.mesh):
        opened = Checkpoints(tmp_path, keep=1)
        restored = opened.restore(2, abstract_state(alone.built, alone.batch))
        opened.close()
    resumed, _ = alone.advance(restored, 1)
    for x, expected in zip(jax.tree.leaves(jax.device_get(resumed)), jax.tree.leaves(after_three), strict=True):
        assert x.dtype == expected.dtype and x.tobytes() == expected.tobytes()
    assert {x.dtype for x in jax.tree.leaves(resumed.params)} == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
