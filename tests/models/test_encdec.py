"""The encoder-decoder: T5's buckets, and what a target can see."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.models import encdec
from sslx.sharding import make_mesh

KEY, S, T = jax.random.key(0), 6, 5


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


def t5_bucket(offset, both_ways):
    """The bucket of a key `offset` after its query, of 32, as T5 describes them: half of the buckets (of each side,
    if there are two) are for exact offsets, the others grow in logarithmic steps up to 128."""
    n = 16 if both_ways else 32
    side = 16 if both_ways and offset > 0 else 0
    far = abs(offset) if both_ways else max(-offset, 0)
    if far < n // 2:
        return side + far
    return side + min(n - 1, n // 2 + math.floor(math.log(far / (n // 2)) / math.log(128 / (n // 2)) * (n - n // 2)))


@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets(both_ways):
    expected = np.array([[t5_bucket(s - t, both_ways) for s in range(300)] for t in range(300)])
    got = np.asarray(encdec.buckets(300, 300, both_ways))
    # In float32 a bucket may begin one offset later, at a power of the base: nowhere else.
    assert (got != expected).mean() < 0.01 and np.abs(got - expected).max() <= 1
    assert set(got.ravel()) == set(range(32)) - ({16} if both_ways else set())


@pytest.mark.parametrize("position", ["relative", "rope"])
@pytest.mark.parametrize("scan", [True, False])
def test_a_target_sees_all_inputs_and_the_targets_before_it(position, scan):
    model = encdec.make(vocab_size=16, width=16, depth=2, decoder_depth=1, heads=2, hidden=16, position=position,
                        tied=False, scan=scan, dtype="float32")
    inputs, targets = jnp.arange(1, 1 + S)[None], jnp.arange(10, 10 + T)[None]  # 0 stands before the first target
    params = model.init(KEY, inputs, targets)["params"]

    def at(table, t):
        logits = model.apply({"params": params | {"tokens": {"embedding": table}}}, inputs, targets,
                             method="logits")
        return (logits * (jnp.arange(T) == t)[:, None] * jnp.arange(logits.shape[-1])).sum()

    gradient = jax.jit(jax.grad(at))
    for t in range(T):
        reached = np.flatnonzero(np.abs(gradient(params["tokens"]["embedding"], t)).max(-1))
        assert reached.tolist() == [0, *range(1, 1 + S), *range(10, 10 + t)]


def test_relative_biases_belong_to_heads_and_buckets():
    module = encdec.RelativeBias(3, True)
    table = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    bias = module.apply({"params": {"embedding": table}}, 4, 6)
    assert bias.shape == (3, 1, 4, 6)
    for h, t, s in np.ndindex(3, 4, 6):
        assert bias[h, 0, t, s] == table[t5_bucket(s - t, True), h]
