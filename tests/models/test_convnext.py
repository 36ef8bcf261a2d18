"""ConvNeXt: published sizes, and its block by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import correlate

from sslx import flops
from sslx.config import UserError
from sslx.models import convnext
from sslx.sharding import make_mesh

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


@pytest.mark.parametrize("options, n_params", [(dict(), 28_589_128), (dict(stages=(3, 3, 27, 3)), 50_223_688)],
                         ids=["tiny", "small"])
def test_published_sizes(options, n_params):
    model, images = convnext.make(**options), jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    features, variables = jax.eval_shape(lambda x: model.init_with_output(KEY, x), images)
    assert features.shape == (2, 768) and features.dtype == jnp.float32
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == n_params - 769_000  # the classifier


def test_flops_are_those_published():
    model = convnext.make(dtype="float32")
    variables = jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    counted = flops.count(model.apply, variables, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)).model_total
    assert counted == pytest.approx(2 * 4.46e9, rel=0.01)  # 4.5 G multiplications and additions


def test_a_block_by_hand():
    rng, x = np.random.default_rng(0), np.random.default_rng(1).normal(size=(2, 6, 5, 4)).astype(np.float32)
    block = convnext.Mixing(0.1, (1, 1), jnp.float32)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32),
                          block.init(KEY, x)["params"])
    p = jax.tree.map(np.float64, params)
    y = np.stack([np.stack([correlate(np.float64(image[..., c]), p["depthwise"]["kernel"][:, :, 0, c], mode="constant")
                            for c in range(4)], -1) for image in x]) + p["depthwise"]["bias"]
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    y = y * p["norm"]["scale"] + p["norm"]["bias"]
    h = y @ p["up"]["kernel"] + p["up"]["bias"]
    h = h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))) / 2
    expected = x + p["scale"] * (h @ p["down"]["kernel"] + p["down"]["bias"])
    np.testing.assert_allclose(block.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-4)


def test_odd_sides_are_halved_and_too_small_images_refused():
    model = convnext.make(stages=(1, 1, 1), width=4, stem=2, dtype="float32")
    features, _ = model.init_with_output(KEY, np.zeros((2, 14, 14, 1), np.float32))
    assert features.shape == (2, 16)
    with pytest.raises(UserError, match="cannot reduce 1 x 1 pixels 2 times"):
        model.init(KEY, np.zeros((2, 4, 4, 1), np.float32))


def test_rematerialization_changes_nothing():
    images = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)

    def gradient(remat):
        model = convnext.make(stages=(1, 1), width=4, stem=2, layer_scale=0.5, remat=remat, dtype="float32")
        variables = model.init(KEY, images)
        return jax.jit(jax.grad(lambda v: jnp.square(model.apply(v, images)).sum()))(variables)

    again, plain = gradient("full"), gradient("none")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), again, plain)
