import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sslx import channels, flops, sharding

SHAPES = [((4, 6, 5), (5,)), ((8, 3), (3,)), ((4, 6, 2, 3, 5), (2, 3, 5)), ((4, 2, 3, 5), (5,))]


def normal(shape, dtype, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def gradients(of, x, b, weights):
    return jax.grad(lambda x, b: (of(x, b) * weights).astype(jnp.float32).sum(), (0, 1))(x, b)


OF = {"plus": (channels.plus, jnp.add), "times": (channels.times, jnp.multiply),
      "mean": (lambda x, b: jnp.square(x - b) * channels.mean(x), lambda x, b: jnp.square(x - b) * x.mean(
          tuple(range(x.ndim - 1))))}


@pytest.mark.parametrize("name, shape, shared", [(name, *shapes) for name in OF for shapes in SHAPES
                                                 if name != "mean" or len(shapes[1]) == 1])
def test_values_and_gradients_are_those_of_plain_arithmetic(name, shape, shared):
    x, b, weights = normal(shape, "float32", 0), normal(shared, "float32", 1), normal(shape, "float32", 2)
    ours, plain = OF[name]
    np.testing.assert_allclose(ours(x, b), plain(x, b), rtol=1e-6, atol=1e-6)
    for got, expected in zip(gradients(ours, x, b, weights), gradients(plain, x, b, weights), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_sum_of_bfloat16_is_rounded_once():
    x, b, weights = normal((300, 5), "bfloat16", 0), normal((5,), "bfloat16", 1), normal((300, 5), "bfloat16", 2)
    got = gradients(channels.plus, x, b, weights)[1]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), weights.astype(np.float32).sum(0), rtol=2**-8)


def test_sums_of_sharded_rows_are_global_and_keep_the_sharding_of_what_they_belong_to():
    x, b = normal((8, 4, 6), "float32", 0), normal((6,), "float32", 1)
    expected = gradients(jnp.multiply, x, b, x)
    with jax.set_mesh(sharding.make_mesh(data=2, tensor=2, fsdp=2)):
        cut = [jax.device_put(x, P(("data", "fsdp"), None, "tensor")), jax.device_put(b, P("tensor"))]
        got = jax.jit(lambda x, b: gradients(channels.times, x, b, x))(*cut)
        assert jax.typeof(got[1]).sharding.spec == P("tensor")
        mean = jax.jit(channels.mean)(jax.device_put(x, P(("data", "fsdp"))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)
    np.testing.assert_allclose(mean, x.mean((0, 1)), rtol=1e-5, atol=1e-6)


def test_sums_are_no_products():
    x, b = normal((8, 6), "float32", 0), normal((6,), "float32", 1)
    assert flops.count(lambda x, b: gradients(channels.times, x, b, x), x, b).hw_total == 0
