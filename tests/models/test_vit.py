"""The vision transformer: any patch, any image size, and only the patches that it is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx.config import UserError
from sslx.models import vit
from sslx.sharding import make_mesh

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


def tiny(**options):
    model = vit.make(**(dict(image_size=8, patch=2, width=16, depth=1, heads=2, hidden=16, dtype="float32") | options))
    return model, model.init(KEY, IMAGES)


def test_sines_and_cosines_of_the_row_then_of_the_column():
    table = vit.sincos_2d(3, 5, 8)
    for row, col in np.ndindex(3, 5):
        expected = [f(x / 10_000 ** (i / 2)) for x in (row, col) for f in (np.sin, np.cos) for i in range(2)]
        np.testing.assert_allclose(table[row * 5 + col], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_any_patch_that_divides(patch, pool):
    model, variables = tiny(patch=patch, pool=pool)
    tokens = model.apply(variables, IMAGES)
    assert tokens.shape == (2, (8 // patch) ** 2 + (pool == "cls"), 16)
    features = model.apply(variables, IMAGES, method="encode")
    np.testing.assert_allclose(features, tokens[:, 0] if pool == "cls" else tokens.mean(1), rtol=1e-5, atol=1e-6)


def test_a_patch_that_does_not_divide_is_told_the_divisors():
    words = r"model.patch=3 does not divide model.image_size=8; the divisors are \[1, 2, 4, 8\]"
    with pytest.raises(UserError, match=words):
        vit.make(image_size=8, patch=3, width=16, depth=1, heads=2)
    with pytest.raises(UserError, match="model.width=18 must be a multiple of 4"):
        vit.make(image_size=8, patch=4, width=18, depth=1, heads=2, position="sincos")


@pytest.mark.parametrize("position", ["learned", "sincos"])
@pytest.mark.parametrize("size", [(4, 4), (12, 8)])
def test_images_of_another_size(position, size):
    model, variables = tiny(position=position)
    images = np.random.default_rng(1).uniform(size=(3, *size, 3)).astype(np.float32)
    tokens = model.apply(variables, images)
    assert tokens.shape == (3, 1 + size[0] * size[1] // 4, 16) and np.isfinite(tokens).all()


@pytest.mark.parametrize("position", ["learned", "sincos"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_hidden_patches_do_not_reach_the_encoder(position, pool):
    model, variables = tiny(position=position, pool=pool)
    keep = jnp.array([[5, 0, 10], [15, 3, 1]])

    def score(images):
        tokens = model.apply(variables, images, keep)
        assert tokens.shape == (2, 3 + (pool == "cls"), 16)
        return (tokens * np.arange(16)).sum()

    gradient = np.abs(jax.grad(score)(IMAGES)).reshape(2, 4, 2, 4, 2, 3).max((2, 4, 5)).reshape(2, 16)
    assert [set(np.flatnonzero(row)) for row in gradient] == [set(row) for row in keep.tolist()]


@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_kept_patches_bring_their_positions(position):
    model, variables = tiny(position=position, pool="mean")
    order = np.random.default_rng(2).permuted(np.tile(np.arange(16), (2, 1)), axis=1)
    shuffled = model.apply(variables, IMAGES, jnp.asarray(order))
    whole = model.apply(variables, IMAGES)
    expected = np.take_along_axis(np.asarray(whole), order[..., None], 1)
    np.testing.assert_allclose(shuffled, expected, rtol=1e-4, atol=1e-5)


def test_vit_base_has_its_published_size():
    model = vit.make(image_size=224, patch=16, width=768, depth=12, heads=12)
    params = jax.eval_shape(lambda: model.init(KEY, jnp.zeros((1, 224, 224, 3))))
    classifier = 768 * 1000 + 1000
    class_position = 768  # ours has none: the class token is learned, and a vector added to it would say nothing more
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 86_567_656 - classifier - class_position
