import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sslx import channels, flops, sharding

# Rows that are few, many, and more than a cache holds with a rest; channels in several dimensions.
SHAPES = [((4, 6, 5), (5,)), ((8, 3), (3,)), ((4, 6, 2, 3, 5), (2, 3, 5)), ((4, 2, 3, 5), (5,)), ((1237, 130), (130,)),
          ((3, 2101, 32), (32,))]


def normal(shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def gradients(of, weights, *of_what):
    return jax.grad(lambda *of_what: (of(*of_what) * weights).astype(jnp.float32).sum(), tuple(range(len(of_what))))(
        *of_what)


def normed(of):
    """By the mean and variance that `of` finds, so that its gradient tells of both."""
    def call(x, b):
        mean, var = of(x)
        return (x - mean) / jnp.sqrt(var + 1) * b
    return call


def plain_moments(x):
    rows = x.reshape(-1, x.shape[-1])
    return rows.mean(0), rows.var(0)


OF = {"plus": (channels.plus, jnp.add), "times": (channels.times, jnp.multiply),
      "affine": (lambda x, b: channels.affine(x, b, 2 * b + 1), lambda x, b: x * b + 2 * b + 1),
      "moments": (normed(channels.moments), normed(plain_moments))}


@pytest.mark.parametrize("name, shape, shared", [(name, *shapes) for name in OF for shapes in SHAPES
                                                 if name != "moments" or len(shapes[1]) == 1])
def test_values_and_gradients_are_those_of_plain_arithmetic(name, shape, shared):
    # In eighths, float32 sums of so many products are exact.
    x, b, weights = (jnp.round(8 * y) / 8 for y in (normal(shape), normal(shared, seed=1), normal(shape, seed=2)))
    ours, plain = OF[name]
    np.testing.assert_allclose(ours(x, b), plain(x, b), rtol=1e-6, atol=1e-6)
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) for a in (weights, x, b)]
        expected = gradients(plain, *map(jnp.asarray, wide))
    for got, correct in zip(gradients(ours, weights, x, b), expected, strict=True):
        np.testing.assert_allclose(got, correct, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean, sd", [(3.0, 1e-3), (10.0, 1e-3), (10.0, 1e-4), (30.0, 1e-2)])
def test_variances_of_features_that_hardly_vary_are_not_negative(mean, sd):
    x = mean * np.linspace(1, 2, 64, dtype=np.float32) + sd * normal((512, 64))
    var = channels.moments(x)[1]
    assert (var >= 0).all()
    np.testing.assert_allclose(var, sd**2, atol=4e-6 * mean**2)


@pytest.mark.parametrize("rows", [300, 4099])
def test_a_sum_of_bfloat16_is_rounded_once(rows):
    x, b, weights = normal((rows, 65), "bfloat16"), normal(65, "bfloat16", 1), normal((rows, 65), "bfloat16", 2)
    got = gradients(channels.plus, weights, x, b)[1]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), weights.astype(np.float32).sum(0), rtol=2**-8)


@pytest.mark.parametrize("name", ["times", "affine"])
@pytest.mark.parametrize("rows, shared", [
    (P(("data", "fsdp"), None, "tensor"), P("tensor")), (P(("data", "fsdp"), None, "tensor"), P()),
    (P(None, "data", "tensor"), P("tensor")), (P(("data", "fsdp")), P()), (P(), P())])
def test_sums_of_sharded_rows_are_global_and_keep_the_sharding_of_what_they_belong_to(name, rows, shared):
    x, b = normal((8, 4, 6)), normal(6, seed=1)
    ours, plain = OF[name]
    expected = gradients(plain, x, x, b)
    with jax.set_mesh(sharding.make_mesh(data=2, tensor=2, fsdp=2)):
        cut = [jax.device_put(x, rows), jax.device_put(b, shared)]
        got = jax.jit(lambda x, b: gradients(ours, x, x, b))(*cut)
        assert jax.typeof(got[1]).sharding.spec == jax.typeof(cut[1]).sharding.spec
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


def test_moments_of_sharded_rows_are_global():
    x = normal((8, 4, 6))
    with jax.set_mesh(sharding.make_mesh(data=2, tensor=2, fsdp=2)):
        got = jax.jit(channels.moments)(jax.device_put(x, P(("data", "fsdp"))))
    for ours, plain in zip(got, plain_moments(x), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)


def test_sums_are_no_products():
    x, b = normal((8, 6)), normal(6, seed=1)
    assert flops.count(lambda x, b: gradients(channels.times, x, x, b), x, b).hw_total == 0
