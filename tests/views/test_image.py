"""Views of images against Pillow, SciPy, colorsys and NumPy."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from sslx import config
from sslx.config import UserError
from sslx.sharding import batch_sharding, make_mesh
from sslx.views import image, interleave, separate

PLAIN = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0)
KEY = jax.random.key(7)


def augment(images, **options):
    return np.asarray(jax.jit(image.augmentation(**options))(KEY, images))


def pixels(batch=8, height=16, width=16, channels=3):
    return np.random.default_rng(0).integers(0, 256, (batch, height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_view_without_changes_is_the_image(channels):
    images = pixels(channels=channels)
    np.testing.assert_allclose(augment(images, size=16, **PLAIN), images / 255, atol=1e-6)


def test_zero_strengths_are_the_image():
    images = pixels()
    still = PLAIN | dict(jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    np.testing.assert_allclose(augment(images, size=16, **still), images / 255, atol=1e-6)


def test_flip_mirrors_the_columns():
    images = pixels()
    flipped = augment(images, size=16, **PLAIN | dict(flip=1.0))
    np.testing.assert_allclose(flipped, images[:, :, ::-1] / 255, atol=1e-6)


@pytest.mark.parametrize("box", [(0, 0, 20, 24), (3, 5, 10, 10), (2.5, 1.25, 13.5, 20.75), (6, 6, 4, 5)])
@pytest.mark.parametrize("size", [8, 16])
def test_resize_of_a_box_equals_pillow(box, size):
    top, left, height, width = map(float, box)
    x_HW = np.random.default_rng(0).random((20, 24), np.float32)
    rows_BSH = image.resize_matrix(jnp.array([top]), jnp.array([height]), 20, size)
    cols_BSW = image.resize_matrix(jnp.array([left]), jnp.array([width]), 24, size)
    resized = image.separable(x_HW[None, None], rows_BSH, cols_BSW)[0, 0]
    reference = Image.fromarray(x_HW).resize((size, size), Image.Resampling.BILINEAR,
                                             box=(left, top, left + width, top + height))
    np.testing.assert_allclose(resized, reference, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_scipy(sigma):
    x_HW = np.random.default_rng(0).random((20, 20), np.float32)
    blur_BSS = image.blur_matrix(jnp.array([sigma]), 20)
    blurred = image.separable(x_HW[None, None], blur_BSS, blur_BSS)[0, 0]
    np.testing.assert_allclose(blurred, gaussian_filter(x_HW, sigma, mode="reflect", truncate=9), atol=1e-5)


@pytest.mark.parametrize("shape", [(32, 32), (20, 48)])
def test_crop_boxes_lie_in_the_image_with_the_wanted_areas_and_ratios(shape):
    height, width = shape
    top, left, h, w = map(np.asarray, image.crop_boxes(image.draw(KEY, 4000), height, width, (0.2, 1.0), (0.75, 4 / 3)))
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height + 1e-3).all() and (left + w <= width + 1e-3).all()
    area = h * w / (height * width)
    # Uniform in [0.2, 1]: mean 0.6, standard error 0.0037.
    assert abs(area.mean() - 0.6) < 0.015 and area.min() < 0.21 and area.max() > 0.99
    fits = (w / h > 0.7499) & (w / h < 1.3334)
    impossible = area * width / height > 4 / 3
    assert (fits | impossible).all()
    assert np.log(w / h)[area < 0.3].min() < np.log(0.8)
    # The place is uniform: the crop's centre is the image's on average.
    assert abs((top + h / 2).mean() / height - 0.5) < 0.02 and abs((left + w / 2).mean() / width - 0.5) < 0.02


def numpy_jitter(x_HWC, brightness, contrast, saturation, hue):
    def blend(x, other, factor):
        return np.clip(factor * x + (1 - factor) * other, 0, 1)

    def gray(x):
        return x @ [0.2989, 0.587, 0.114] if x.shape[-1] == 3 else x[..., 0]

    x = blend(x_HWC, 0, brightness)
    x = blend(x, gray(x).mean(), contrast)
    if x.shape[-1] == 1:
        return x
    x = blend(x, gray(x)[..., None], saturation)
    hsv = (colorsys.rgb_to_hsv(*p) for p in x.reshape(-1, 3))
    turned = [colorsys.hsv_to_rgb((h + hue) % 1, s, v) for h, s, v in hsv]
    return np.reshape(turned, x.shape)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factors", [(1.5, 0.4, 1.7, 0.3), (0.6, 1.8, 0.2, -0.45), (1.0, 1.0, 0.0, 0.5)])
def test_colour_jitter_equals_numpy(channels, factors):
    x_BHWC = np.random.default_rng(0).random((2, 8, 8, channels), np.float32)
    x_BHWC[0, 0, 0] = 0.5
    jittered = image.colour_jitter(x_BHWC.transpose(0, 3, 1, 2), *(jnp.full(2, f) for f in factors))
    expected = np.stack([numpy_jitter(x, *factors) for x in x_BHWC])
    np.testing.assert_allclose(jittered.transpose(0, 2, 3, 1), expected, atol=1e-5)


def test_solarize_inverts_bright_pixels():
    images = pixels()
    x = images / 255
    solarized = augment(images, size=16, **PLAIN | dict(solarize=1.0))
    np.testing.assert_allclose(solarized, np.where(x >= 0.5, 1 - x, x), atol=1e-6)


def test_grayscale_is_luma_in_all_channels():
    images = pixels()
    gray = augment(images, size=16, **PLAIN | dict(grayscale=1.0))
    np.testing.assert_allclose(gray, np.repeat((images / 255 @ image.LUMA)[..., None], 3, -1), atol=1e-5)


@pytest.mark.parametrize("option", ["flip", "jitter", "grayscale", "blur", "solarize"])
def test_each_change_happens_with_its_probability(option):
    images = pixels(2000, 8, 8)
    view = augment(images, size=8, **PLAIN | {option: 0.3, "blur_sigma": (1.0, 2.0)})
    changed = (np.abs(view - images / 255) > 1e-4).any((1, 2, 3)).mean()
    assert abs(changed - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 2000)


def test_jitter_factors_are_uniform():
    u = image.draw(KEY, 4000)
    brightness, contrast, _ = map(np.asarray, image.jitter_factors(u, 1.0, 0.4, 1.5, 0.4))
    assert 0.6 <= brightness.min() < 0.61 and 1.39 < brightness.max() < 1.4 and abs(brightness.mean() - 1) < 0.02
    assert 0 <= contrast.min() < 0.01 and 2.49 < contrast.max() < 2.5
    hue = np.asarray(image.hue_shift(u, 1.0, 0.2))
    assert abs(hue.mean()) < 0.01 and hue.min() < -0.19 and hue.max() > 0.19


def test_views_do_not_depend_on_the_mesh():
    view = image.augmentation(size=12, solarize=0.5)
    other = image.augmentation(size=12, blur=0.1)
    small = image.augmentation(size=8)

    def everything(key, images):
        patches = image.patchify(images, 4)
        restored = image.unpatchify(patches, 4, images.shape[1:])
        return image.multi_crop(key, images, (view, other), small, 3), patches, restored

    results = []
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(), make_mesh(data=2, fsdp=2, tensor=2)):
        with jax.set_mesh(mesh):
            images = jax.device_put(pixels(16), batch_sharding(mesh))
            results.append(jax.tree.map(np.asarray, jax.jit(everything)(KEY, images)))
    for result in results[1:]:
        jax.tree.map(lambda one, many: np.testing.assert_allclose(one, many, atol=2e-6), results[0], result)


def test_multi_crop_is_interleaved_and_every_view_differs():
    view = image.augmentation(size=16, **PLAIN | dict(scale=(0.3, 0.6)))
    still = image.augmentation(size=16, **PLAIN)
    images = pixels()
    globals_, locals_ = image.multi_crop(KEY, images, (still, view), view, 3)
    np.testing.assert_allclose(globals_[::2], images / 255, atol=1e-6)
    assert globals_.shape == (16, 16, 16, 3) and locals_.shape == (24, 16, 16, 3)
    views = [np.asarray(x) for x in (globals_[1::2], *separate(locals_, 3))]
    for i, a in enumerate(views):
        for b in views[:i]:
            assert (np.abs(a - b).max((1, 2, 3)) > 0.05).all()
    # Rows b V ... b V + V - 1 are views of image b: a flat image stays flat.
    flat = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None, None, None] * 30, (8, 16, 16, 3))
    _, flat_locals = image.multi_crop(KEY, flat, (still,), view, 3)
    np.testing.assert_allclose(flat_locals.mean((1, 2, 3)) * 255, np.repeat(np.arange(8) * 30, 3), atol=1e-3)
    assert image.multi_crop(KEY, images, (still,), view, 0)[1] is None


def test_centres_of_cells_are_where_a_crop_shows_them():
    """Of images that show where they are: each pixel its row and column, which pixels of a view round to .05.

    Beside a border a view blends less.
    """
    side, size = 64, 8
    place_HW = np.moveaxis(np.indices((side, side)) + 0.5, 0, -1)
    images = np.broadcast_to(np.concatenate([place_HW / side, place_HW[..., :1]], -1), (16, side, side, 3))
    view = image.augmentation(size=size, **PLAIN | dict(scale=(0.1, 0.5), ratio=(0.5, 2), flip=0.5))
    shown, box = (np.asarray(x) if i == 0 else x for i, x in enumerate((view(KEY, images), view.where(KEY, images))))
    lie = np.asarray(image.centres(box, size, size))
    inside = ((lie > 8) & (lie < side - 8)).all(-1)
    assert 0 < box.flipped.sum() < 16 and inside.sum() > 200
    np.testing.assert_allclose(shown[inside][:, :2] * side, lie[inside], atol=0.1)


def test_separate_undoes_interleave():
    parts = np.random.default_rng(0).normal(size=(3, 4, 2))
    together = interleave(parts)
    np.testing.assert_array_equal(together[4], np.float32(parts[1, 1]))
    np.testing.assert_array_equal(separate(together, 3), np.float32(parts))


def test_patchify_reads_in_order_and_inverts():
    images = pixels(2, 8, 12)
    patches = image.patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    np.testing.assert_array_equal(patches[1, 4].reshape(4, 4, 3), images[1, 4:8, 4:8])
    np.testing.assert_array_equal(image.unpatchify(patches, 4, (8, 12, 3)), images)


def test_normalize_per_channel():
    images, mean, std = pixels(), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    np.testing.assert_allclose(image.normalize(images, mean, std), (images / 255 - mean) / std, atol=1e-5)


@pytest.mark.parametrize("options", [dict(size=0), dict(flip=1.5), dict(scale=(0.5, 0.2)), dict(hue=0.7),
                                     dict(contrast=-1.0), dict(blur_sigma=(0.0, 1.0)), dict(ratio=(2.0, 1.0))])
def test_values_out_of_range_name_the_option(options):
    (name,) = options
    with pytest.raises(UserError, match=f"config.objective.view.{name} is"):
        config.call(image.augmentation, dict(size=8) | options, "config.objective.view")


def test_patches_that_do_not_tile_are_an_error():
    with pytest.raises(UserError, match="3 x 3"):
        image.patchify(pixels(), 3)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_block_masks_hide_what_they_say(grid):
    n, shares = grid[0] * grid[1], (0.2, 0.6)
    hidden, ids, weights = map(np.asarray, image.block_masks(KEY, 400, grid, shares, 0.5))
    most = round(0.6 * n)
    assert hidden.shape == (400, n) and ids.shape == weights.shape == (400, most)
    counts = hidden.sum(1)
    assert 0.4 < (counts > 0).mean() < 0.6
    assert counts[counts > 0].min() == round(0.2 * n) and counts.max() == most
    for row in range(400):
        chosen = weights[row] > 0
        assert set(ids[row][chosen]) == set(np.flatnonzero(hidden[row]))
        assert not chosen.any() or abs(weights[row].sum() - 1) < 1e-6
        assert np.ptp(weights[row][chosen]) == 0 if chosen.any() else True
    of_patch = hidden[counts > 0].mean(0)
    assert of_patch.min() > 0.15  # every patch is hidden at times


def test_block_masks_are_blocks():
    """Hidden patches have hidden neighbours, more than as many at random would have."""
    hidden = np.asarray(image.block_masks(KEY, 300, (8, 8), (0.25, 0.25), 1.0)[0]).reshape(-1, 8, 8)
    together = (hidden[:, 1:] & hidden[:, :-1]).sum() + (hidden[:, :, 1:] & hidden[:, :, :-1]).sum()
    assert together / 300 > 2 * 112 * 0.25**2  # of 112 pairs of neighbours
