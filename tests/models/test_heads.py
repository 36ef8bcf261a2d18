"""Projectors and prototypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.models.heads import Projector, Prototypes, unit
from sslx.objectives.token_tower import Head
from sslx.sharding import make_mesh

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


def test_unit_vectors():
    np.testing.assert_allclose(unit(X), X / np.linalg.norm(X, axis=1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(unit(X, 0), X / np.linalg.norm(X, axis=0), rtol=1e-5)
    assert np.isfinite(jax.grad(lambda x: unit(x).sum())(jnp.zeros(3))).all()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_projector_is_normed_over_the_batch(depth):
    projector = Projector(hidden=8, features=4, depth=depth)
    z, variables = projector.init_with_output(KEY, X, train=True)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(0), 1, atol=1e-2)
    assert len([k for k in variables["params"] if k.startswith("Linear")]) == depth


def test_prototypes_are_cosines():
    head = Prototypes(n_prototypes=5)
    cosines, variables = head.init_with_output(KEY, X)
    params = variables["params"]
    assert cosines.shape == (16, 5) and cosines.dtype == jnp.float32 and np.abs(cosines).max() <= 1 + 1e-6
    scaled = params | {"prototypes": params["prototypes"] * np.arange(1, 6)}
    np.testing.assert_allclose(head.apply({"params": scaled}, X), cosines, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(head.apply({"params": params}, 7 * X), cosines, rtol=1e-4, atol=1e-6)


def test_a_projector_without_batch_norm_sees_each_row_by_itself():
    projector = Projector(hidden=8, features=4, depth=3, batch_norm=False)
    z, variables = projector.init_with_output(KEY, X, train=True)
    assert set(variables) == {"params"} and all("bias" in layer for layer in variables["params"].values())
    np.testing.assert_allclose(projector.apply(variables, X[:2], train=True), z[:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_head_of_tokens_is_normed_over_all_tokens_of_the_batch_or_sees_each_by_itself(batch_norm):
    head = Head(hidden=8, bottleneck=4, n_prototypes=5, dtype=jnp.float32, batch_norm=batch_norm)
    logits, variables = head.init_with_output(KEY, X.reshape(4, 4, 6))
    flat, half = (head.apply(variables, x, mutable=["batch_stats"])[0] for x in (X, X.reshape(4, 4, 6)[:2]))
    np.testing.assert_allclose(flat.reshape(4, 4, 5), logits, rtol=1e-5, atol=1e-6)
    assert np.allclose(half, logits[:2], atol=1e-4) != batch_norm
