"""The vision transformer: any patch, any image size, and only the patches that it is given."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sslx import flops
from sslx.config import UserError
from sslx.layers import rope, skipping
from sslx.models import vit
from sslx.sharding import batch_sharding, make_mesh

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


def test_registers_are_seen_by_blocks_and_by_nobody_else():
    model, variables = tiny(registers=3)
    assert variables["params"]["registers"].shape == (3, 16)
    tokens = model.apply(variables, IMAGES)
    assert tokens.shape == (2, 17, 16)
    other = {"params": variables["params"] | {"registers": -variables["params"]["registers"]}}
    assert np.abs(model.apply(other, IMAGES) - tokens).max() > 1e-3


def test_rotary_positions_of_rows_and_columns():
    """Queries and keys meet by how far apart they are in each direction, in images of any size alike."""
    angles = vit.rope_2d(4, 4).reshape(4, 4, 2)
    assert angles.min() == -angles.max() and np.abs(angles).max() < 2 * np.pi
    np.testing.assert_allclose(vit.rope_2d(8, 4).reshape(8, 4, 2)[:, :, 0].mean(1).reshape(4, 2).mean(1),
                               angles[:, 0, 0], atol=1e-5)
    q, k = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    places = np.array([[0.3, -1], [1.1, 0.4], [2.3, 0], [3.1, 1.4]], np.float32)  # two and two with the same offset
    turned_q, turned_k = (rope(jnp.tile(x, (1, 4, 1)), places[None], 100.0)[0] for x in (q, k))
    np.testing.assert_allclose(turned_q[0] @ turned_k[1], turned_q[2] @ turned_k[3], rtol=1e-4, atol=1e-5)
    assert abs(turned_q[0] @ turned_k[1] - turned_q[0] @ turned_k[2]) > 1e-3


@pytest.mark.parametrize("position", ["learned", "sincos", "rope"])
def test_pixels_of_hidden_patches_are_not_seen(position):
    model, _ = tiny(position=position)
    hidden = np.random.default_rng(3).uniform(size=(2, 16)) < 0.5
    variables = model.init(KEY, IMAGES, None, hidden)

    def score(images):
        return (model.apply(variables, images, None, hidden) * np.arange(16)).sum()

    gradient = np.abs(jax.grad(score)(IMAGES)).reshape(2, 4, 2, 4, 2, 3).max((2, 4, 5)).reshape(2, 16)
    np.testing.assert_array_equal(gradient == 0, hidden)


def test_layer_scale_is_what_a_branch_counts_at_birth():
    one, variables = tiny(layer_scale=1.0)
    small, _ = tiny(layer_scale=1e-6)
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 1e-6 if path[-1].key.endswith("_scale") else x, variables)
    np.testing.assert_allclose(small.apply(scaled, IMAGES), one.apply(scaled, IMAGES), rtol=1e-6)
    assert np.abs(one.apply(variables, IMAGES) - one.apply(scaled, IMAGES)).max() > 1e-2


@pytest.mark.parametrize("shape", [dict(data=1), dict(data=4, tensor=2)])
def test_what_is_dropped_is_skipped(shape):
    """Of 4 rows 1 is 0, the others are 4/3 of the branch, which sees no more than they are; everywhere the same."""
    mesh, seen = make_mesh(**shape, devices=jax.devices()[:math.prod(shape.values())]), []
    order = np.argsort(jax.random.uniform(jax.random.key(5), (4, 4)), 1)
    x = np.random.default_rng(0).normal(size=(16, 4, 3)).astype(np.float32)

    def branch(x_BTD):
        seen.append(x_BTD.shape)
        return jnp.sin(x_BTD)

    with jax.set_mesh(mesh):
        y = np.asarray(jax.jit(lambda x: skipping(jax.random.key(5), x, branch, 1, 4))(
            jax.device_put(x, batch_sharding(mesh))))
    assert set(seen) == {(12, 4, 3)}
    dropped = (y == 0).all((1, 2))
    assert (dropped.reshape(4, 4).sum(1) == 1).all()
    np.testing.assert_allclose(y[~dropped], np.sin(x[~dropped]) * 4 / 3, rtol=1e-5)
    np.testing.assert_array_equal(np.flatnonzero(dropped), 4 * np.arange(4) + order[:, 3])


def test_a_block_drops_in_training_alone_and_counts_less():
    model, variables = tiny(drop=0.5, drop_group=2, scan=True)
    whole, _ = tiny(scan=True)

    def trained(variables, images):
        return model.apply(variables, images, rngs={"drop": KEY})

    np.testing.assert_array_equal(model.apply(variables, IMAGES), whole.apply(variables, IMAGES))
    assert np.abs(trained(variables, IMAGES) - whole.apply(variables, IMAGES)).max() > 1e-3
    part, all_ = (flops.count(f, variables, IMAGES).model_total for f in (trained, whole.apply))
    assert 0.5 < part / all_ < 0.6


@pytest.mark.parametrize("options, words", [
    (dict(drop=0.01), "model.drop=0.01 of model.drop_group=8 rows is 0"), (dict(drop=1.0), "is 8: choose a group"),
    (dict(position="rope", width=12), "is no multiple of 4")])
def test_what_cannot_be_dropped_or_turned_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        vit.make(**dict(image_size=8, patch=4, width=16, depth=1, heads=2) | options)


def test_rows_that_do_not_make_groups_are_refused():
    model, variables = tiny(drop=0.5, drop_group=4)
    with pytest.raises(UserError, match="model.drop_group=4 does not divide the 2 views of a batch over 1 devices"):
        model.apply(variables, IMAGES, rngs={"drop": KEY})
