"""Residual networks: published sizes, strides, statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.models import encode, resnet
from sslx.sharding import make_mesh

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


@pytest.mark.parametrize("options, n_params, n_features", [
    (dict(), 11_689_512 - 513_000, 512),  # the published counts, without the classifier of ImageNet
    (dict(stages=(3, 4, 6, 3), bottleneck=True), 25_557_032 - 2_049_000, 2048),
], ids=["18", "50"])
def test_published_sizes(options, n_params, n_features):
    model, images = resnet.make(**options), jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    features, variables = jax.eval_shape(lambda x: model.init_with_output(KEY, x, True), images)
    assert features.shape == (2, n_features) and features.dtype == jnp.float32
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == n_params


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_rematerialization_keeps_the_inputs_of_blocks_and_changes_nothing(stem):
    images = np.random.default_rng(0).uniform(size=(4, 16, 16, 3)).astype(np.float32)

    def gradient(remat):
        model = resnet.make(stages=(1, 2), width=8, stem=stem, remat=remat, dtype="float32")
        variables = dict(model.init(KEY, images, True))
        params = variables.pop("params")

        def loss(params):
            features, stats = encode(model, params, variables, images, train=True)
            return jnp.square(features).sum(), stats

        _, pullback, _ = jax.vjp(loss, params, has_aux=True)
        kept = sum(x.size for x in jax.tree.leaves(pullback) if x.ndim == 4 and len(x) == len(images))
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params), kept

    (plain, all_kept), (again, inputs_kept) = gradient("none"), gradient("full")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), again, plain)
    side = 4 if stem == "imagenet" else 16
    inputs = images.size + 4 * side**2 * 8 * 2 + 4 * (side // 2)**2 * 16
    assert all_kept > 3 * inputs and inputs_kept == inputs


@pytest.mark.parametrize("stem, before_pooling", [("imagenet", 4), ("small", 16), ("small_stride2", 8)])
def test_stems_shrink_the_image_by_their_stride(stem, before_pooling):
    model = resnet.make(stages=(1, 1), width=8, stem=stem, dtype="float32")
    shapes = jax.eval_shape(lambda x: model.init_with_output(KEY, x, True, capture_intermediates=True),
                            jax.ShapeDtypeStruct((2, 16, 16, 1), jnp.float32))[1]["intermediates"]
    assert shapes["stage0_0"]["__call__"][0].shape == (2, before_pooling, before_pooling, 8)
    assert shapes["stage1_0"]["__call__"][0].shape == (2, before_pooling // 2, before_pooling // 2, 16)


def test_training_moves_every_statistic_and_judging_none():
    model = resnet.make(stages=(1,), width=8, stem="small", dtype="float32")
    images = np.random.default_rng(0).uniform(size=(4, 8, 8, 3)).astype(np.float32)
    variables = dict(model.init(KEY, images, True))
    params = variables.pop("params")
    _, still = encode(model, params, variables, images, train=False)
    assert still is variables
    _, moved = encode(model, params, variables, images**2, train=True)
    assert jax.tree.structure(moved) == jax.tree.structure(variables)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), moved, variables)))
