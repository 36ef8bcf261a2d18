"""Views of images: crop, flip, blur and colour, as batched matrix products and elementwise work.

A crop, its resize, the flip and the blur are linear and separable, so together they are one matrix
per example and axis: view = rows_BSH @ image_BHW @ cols_BSW^T.

B batch, C channels, H W of the image, S of the view, P of the patch.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sslx import views
from sslx.config import Count, Nonnegative, Only, Share, UserError

Areas = Annotated[tuple[float, float], Only(lambda s: 0 < s[0] <= s[1] <= 1, "two areas, 0 < least <= greatest <= 1")]
Interval = Annotated[tuple[float, float], Only(lambda r: 0 < r[0] <= r[1], "two positive numbers, the least first")]
Shares = Annotated[tuple[float, float], Only(lambda s: 0 <= s[0] <= s[1] <= 1, "two shares from 0 to 1, least first")]
Hue = Annotated[float, Only(lambda d: 0 <= d <= 0.5, "a shift from 0 to 0.5 turns")]

LUMA = (0.2989, 0.587, 0.114)

# Accelerators round float32 products to fewer bits than a pixel has unless told otherwise.
EXACT = jax.lax.Precision.HIGHEST


class Draw(NamedTuple):
    """One number in [0, 1) per example, [B], for each choice that a view makes."""

    area: jax.Array
    ratio: jax.Array
    top: jax.Array
    left: jax.Array
    flip: jax.Array
    blur: jax.Array
    sigma: jax.Array
    jitter: jax.Array
    brightness: jax.Array
    contrast: jax.Array
    saturation: jax.Array
    hue: jax.Array
    grayscale: jax.Array
    solarize: jax.Array


class Box(NamedTuple):
    """Where crops lie in their images, float32 [B] in pixels, and which of them are flipped left to right."""

    top: jax.Array
    left: jax.Array
    height: jax.Array
    width: jax.Array
    flipped: jax.Array


@dataclasses.dataclass(frozen=True)  # jit takes no tuple for a function
class View:
    """make:  (key, images [B, H, W, C]) -> views [B, S, S, C].
    where: (key, images) -> the `Box` of each.
    """

    make: Callable[[jax.Array, jax.Array], jax.Array]
    where: Callable[[jax.Array, jax.Array], Box]

    def __call__(self, key, images_BHWC):
        return self.make(key, images_BHWC)


def augmentation(*, size: Count, scale: Areas = (0.2, 1.0), ratio: Interval = (3 / 4, 4 / 3), flip: Share = 0.5,
                 jitter: Share = 0.8, brightness: Nonnegative = 0.8, contrast: Nonnegative = 0.8,
                 saturation: Nonnegative = 0.8, hue: Hue = 0.2, grayscale: Share = 0.2, blur: Share = 0.5,
                 blur_sigma: Interval = (0.1, 2.0), solarize: Share = 0.0) -> View:
    """A view: (key, images [B, H, W, C], uint8 or float in [0, 1]) -> float32 [B, size, size, C] in [0, 1].

    Random resized crop, flip, blur, colour jitter, grayscale, solarize, as in SimCLR (Chen et al. 2020)
    and BYOL (Grill et al. 2020). Two differences, both so that linear steps are one product: the blur
    comes before the colours (they commute but for clipping and hue), and the colours have one order
    (brightness, contrast, saturation, hue). Images of one channel have no saturation, hue, grayscale.

    size:       pixels of a side of the view.
    scale:      area of the crop over that of the image, uniform.
    ratio:      width over height of the crop, log-uniform among those that fit the image.
    flip, jitter, grayscale, blur, solarize: probabilities.
    brightness, contrast, saturation: d, for a factor uniform in [max(0, 1 - d), 1 + d].
    hue:        d <= 0.5, for a shift uniform in [-d, d] turns.
    blur_sigma: uniform, in pixels of the view.
    """

    def placed(u, images_BHWC):
        return Box(*crop_boxes(u, *images_BHWC.shape[1:3], scale, ratio), u.flip < flip)

    def view(key, images_BHWC):
        u = draw(key, len(images_BHWC))
        box, (_, height, width, _) = placed(u, images_BHWC), images_BHWC.shape
        rows_BSH = resize_matrix(box.top, box.height, height, size)
        cols_BSW = resize_matrix(box.left, box.width, width, size, box.flipped)
        if blur:
            # So narrow a Gaussian is the identity matrix, exactly.
            sigma_B = jnp.where(u.blur < blur, between(u.sigma, *blur_sigma), 1e-3)
            blur_BSS = blur_matrix(sigma_B, size)
            rows_BSH, cols_BSW = (jnp.matmul(blur_BSS, m, precision=EXACT) for m in (rows_BSH, cols_BSW))
        x_BCSS = separable(to_float(images_BHWC).transpose(0, 3, 1, 2), rows_BSH, cols_BSW)
        if jitter:
            factors = jitter_factors(u, jitter, brightness, contrast, saturation)
            x_BCSS = colour_jitter(x_BCSS, *factors, hue_shift(u, jitter, hue) if hue else None)
        if grayscale and x_BCSS.shape[1] == 3:
            x_BCSS = blend(x_BCSS, luma(x_BCSS), jnp.where(u.grayscale < grayscale, 0.0, 1.0))
        if solarize:
            x_BCSS = solarized(x_BCSS, jnp.where(u.solarize < solarize, 0.5, jnp.inf))
        return x_BCSS.transpose(0, 2, 3, 1)

    return View(view, lambda key, images_BHWC: placed(draw(key, len(images_BHWC)), images_BHWC))


def augment(key: jax.Array, images_BHWC: jax.Array, **options) -> jax.Array:
    """One view of a batch, float32 [B, size, size, C]; the options are those of `augmentation`."""
    return augmentation(**options)(key, images_BHWC)


def multi_crop(key: jax.Array, images_BHWC: jax.Array, global_: Sequence[View], local: View | None,
               n_local: int) -> tuple[jax.Array, jax.Array | None]:
    """Multi-crop: ([B V, S, S, C], [B n_local, s, s, C]), both interleaved (Caron et al. 2020).

    `global_` holds one view per global crop (they may differ, as in BYOL and DINO); all local crops are
    draws of `local`, None if there are none.
    """
    keys, key_local = crop_keys(key, len(global_), local is not None and n_local > 0)
    made = views.interleave([view(k, images_BHWC) for k, view in zip(keys, global_, strict=True)])
    if local is None or not n_local:
        return made, None
    return made, local(key_local, views.interleave([images_BHWC] * n_local))


def crop_keys(key: jax.Array, n_global: int, beside: bool) -> tuple[list[jax.Array], jax.Array]:
    """The keys of global crops, and that of all local ones if there are some `beside` them."""
    key_global, key_local = jax.random.split(key) if beside else (key, key)
    return [jax.random.fold_in(key_global, v) for v in range(n_global)], key_local


def centres(box: Box, rows: int, cols: int) -> jax.Array:
    """Where the centres of a grid of cells over a crop lie in its image, (row, column) in pixels [B, rows, cols, 2]."""
    down_R, across_C = ((np.arange(n, dtype=np.float32) + 0.5) / n for n in (rows, cols))
    across_BC = jnp.where(box.flipped[:, None], 1 - across_C, across_C)
    row_BR = box.top[:, None] + down_R * box.height[:, None]
    col_BC = box.left[:, None] + across_BC * box.width[:, None]
    shape = (len(row_BR), rows, cols)
    return jnp.stack([jnp.broadcast_to(row_BR[:, :, None], shape), jnp.broadcast_to(col_BC[:, None], shape)], -1)


def draw(key: jax.Array, batch: int) -> Draw:
    return Draw(*views.uniform(key, (batch, len(Draw._fields))).T)


def between(u: jax.Array, low: jax.Array | float, high: jax.Array | float) -> jax.Array:
    """A number uniform in [low, high) from one uniform in [0, 1)."""
    return low + u * (high - low)


def crop_boxes(u: Draw, height: int, width: int, scale: tuple[float, float],
               ratio: tuple[float, float]) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Boxes (top, left, height, width), each float32 [B] in pixels, that lie in the image.

    The area is uniform in `scale`; the ratio r is log-uniform in `ratio` among those with
    sqrt(area r) <= width and sqrt(area / r) <= height, or the nearest such r where there are none.
    """
    area_B = between(u.area, *scale) * (height * width)
    narrowest_B, widest_B = area_B / height**2, width**2 / area_B
    low_B = jnp.clip(ratio[0], narrowest_B, widest_B)
    high_B = jnp.clip(ratio[1], narrowest_B, widest_B)
    ratio_B = low_B * (high_B / low_B) ** u.ratio
    height_B = jnp.minimum(jnp.sqrt(area_B / ratio_B), height)
    width_B = jnp.minimum(jnp.sqrt(area_B * ratio_B), width)
    return u.top * (height - height_B), u.left * (width - width_B), height_B, width_B


def resize_matrix(start_B: jax.Array, length_B: jax.Array, n: int, size: int,
                  flipped_B: jax.Array | None = None) -> jax.Array:
    """M [B, size, n]: M x is x[start : start + length] resized to `size` pixels, bilinear and antialiased.

    M_sj ~ max(0, 1 - |j + 1/2 - c_s| / max(1, z)), c_s = start + (s + 1/2) z, z = length / size, rows
    summing to 1: the triangle filter of Pillow's `resize(..., BILINEAR, box=...)`.
    """
    s_BS = jnp.arange(size, dtype=jnp.float32)[None] + jnp.zeros_like(start_B)[:, None]
    if flipped_B is not None:
        s_BS = jnp.where(flipped_B[:, None], size - 1 - s_BS, s_BS)
    zoom_B1 = (length_B / size)[:, None]
    centre_BS = start_B[:, None] + (s_BS + 0.5) * zoom_B1
    distance_BSn = jnp.abs(jnp.arange(n) + 0.5 - centre_BS[..., None])
    weight_BSn = jnp.maximum(0, 1 - distance_BSn / jnp.maximum(1, zoom_B1)[..., None])
    return weight_BSn / weight_BSn.sum(-1, keepdims=True)


def blur_matrix(sigma_B: jax.Array, size: int) -> jax.Array:
    """G [B, size, size]: G x is x under a Gaussian of width sigma pixels, with mirrored borders.

    Each border mirrors once, which is exact while the Gaussian has no weight beyond `size` pixels.
    """
    here = jnp.arange(size, dtype=jnp.float32)
    offset_3SS = here[:, None] - jnp.stack([here, -1 - here, 2 * size - 1 - here])[:, None]
    distance_B3SS = offset_3SS / sigma_B[:, None, None, None]
    weight_BSS = jnp.exp(-0.5 * distance_B3SS**2).sum(1)
    return weight_BSS / weight_BSS.sum(-1, keepdims=True)


def separable(x_BCHW: jax.Array, rows_BSH: jax.Array, cols_BSW: jax.Array) -> jax.Array:
    """rows @ x @ cols^T for each example and channel, float32 [B, C, S, S]."""
    x_BCSW = jnp.einsum("bsh,bchw->bcsw", rows_BSH, x_BCHW, precision=EXACT)
    return jnp.einsum("bcsw,btw->bcst", x_BCSW, cols_BSW, precision=EXACT)


def jitter_factors(u: Draw, probability: float, *strengths: float) -> list[jax.Array]:
    """Factors of brightness, contrast and saturation, each [B]; 1 where there is no jitter."""
    drawn = (u.brightness, u.contrast, u.saturation)
    return [jnp.where(u.jitter < probability, between(u_B, max(0.0, 1 - d), 1 + d), 1.0)
            for u_B, d in zip(drawn, strengths, strict=True)]


def hue_shift(u: Draw, probability: float, hue: float) -> jax.Array:
    """Turns of the colour circle, [B]; 0 where there is no jitter."""
    return jnp.where(u.jitter < probability, between(u.hue, -hue, hue), 0.0)


def colour_jitter(x_BCHW: jax.Array, brightness_B: jax.Array, contrast_B: jax.Array, saturation_B: jax.Array,
                  hue_B: jax.Array | None) -> jax.Array:
    """Brightness, contrast, saturation and hue in this order, clipped to [0, 1] after each.

    brightness: f x; contrast: f x + (1 - f) mean luma; saturation: f x + (1 - f) luma.
    """
    x_BCHW = blend(x_BCHW, 0.0, brightness_B)
    x_BCHW = blend(x_BCHW, luma(x_BCHW).mean((1, 2, 3), keepdims=True), contrast_B)
    if x_BCHW.shape[1] != 3:
        return x_BCHW
    x_BCHW = blend(x_BCHW, luma(x_BCHW), saturation_B)
    return x_BCHW if hue_B is None else rotate_hue(x_BCHW, hue_B)


def blend(x_BCHW: jax.Array, other: jax.Array | float, factor_B: jax.Array) -> jax.Array:
    """f x + (1 - f) other, clipped to [0, 1]."""
    factor_B111 = factor_B[:, None, None, None]
    return jnp.clip(factor_B111 * x_BCHW + (1 - factor_B111) * other, 0, 1)


def luma(x_BCHW: jax.Array) -> jax.Array:
    """Gray [B, 1, H, W] of an image of one or three channels (ITU-R BT.601)."""
    if x_BCHW.shape[1] != 3:
        return x_BCHW.mean(1, keepdims=True)
    red, green, blue = (x_BCHW[:, c : c + 1] for c in range(3))
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def rotate_hue(x_BCHW: jax.Array, turns_B: jax.Array) -> jax.Array:
    """The hue of HSV shifted by a part of the circle, value and saturation kept.

    With hue h in sixths of the circle: channel = v - (v - min) clip(min(k, 4 - k), 0, 1), k = (n + h) mod 6, for
    n = 5, 3, 1 in red, green, blue.
    """
    red, green, blue = x_BCHW[:, 0], x_BCHW[:, 1], x_BCHW[:, 2]
    value, least = x_BCHW.max(1), x_BCHW.min(1)
    chroma = value - least
    per_chroma = 1 / jnp.where(chroma == 0, 1, chroma)
    hue = jnp.where(value == red, (green - blue) * per_chroma,
                    jnp.where(value == green, 2 + (blue - red) * per_chroma, 4 + (red - green) * per_chroma))
    hue = hue + 6 * turns_B[:, None, None]

    def channel(n):
        k = (n + hue) % 6
        return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

    return jnp.stack([channel(5), channel(3), channel(1)], 1)


def solarized(x_BCHW: jax.Array, threshold_B: jax.Array) -> jax.Array:
    """Pixels at or above the threshold inverted."""
    return jnp.where(x_BCHW >= threshold_B[:, None, None, None], 1 - x_BCHW, x_BCHW)


def to_float(images: jax.Array) -> jax.Array:
    """uint8 pixels as float32 in [0, 1]; floats as they are, in float32."""
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images.astype(jnp.float32)


def normalize(images_BHWC: jax.Array, mean: float | Sequence[float] = 0.5,
              std: float | Sequence[float] = 0.25) -> jax.Array:
    """(x - mean) / std of images in [0, 1], or of uint8 pixels as such; one number, or one per channel."""
    return (to_float(images_BHWC) - jnp.asarray(mean)) / jnp.asarray(std)


def patchify(images_BHWC: jax.Array, p: int) -> jax.Array:
    """Patches [B, H/p W/p, p p C] in reading order; pixels of a patch in the order (row, column, channel).

    Raises UserError if p does not divide both sides.
    """
    batch, height, width, channels = images_BHWC.shape
    if height % p or width % p:
        raise UserError(f"patches of {p} x {p} pixels (model.patch) do not tile an image of {height} x {width} (of the"
                        " data, or the size of a view); the patch size must divide both sides")
    reshape = functools.partial(jnp.reshape, out_sharding=views.rows())
    tiles = reshape(images_BHWC, (batch, height // p, p, width // p, p, channels))
    return reshape(tiles.transpose(0, 1, 3, 2, 4, 5), (batch, -1, p * p * channels))


def unpatchify(patches_BND: jax.Array, p: int, shape: tuple[int, int, int]) -> jax.Array:
    """Images [B, H, W, C] of `shape` (H, W, C) from their patches: the inverse of `patchify`."""
    height, width, channels = shape
    batch = len(patches_BND)
    reshape = functools.partial(jnp.reshape, out_sharding=views.rows())
    tiles = reshape(patches_BND, (batch, height // p, width // p, p, p, channels))
    return reshape(tiles.transpose(0, 1, 3, 2, 4, 5), (batch, height, width, channels))


def block_masks(key: jax.Array, batch: int, grid: tuple[int, int], shares: Shares,
                probability: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(hidden bool [B, N], ids [B, M] of patches, weights [B, M]) of masks for patches of a grid, in blocks.

    With `probability` an image hides a share of its N patches, uniform in `shares`: those nearest to a random place,
    in a measure of random shape (log-uniform in 1/3 to 3). The first of its ids are these, of weights that sum to 1;
    weights of other ids and images are 0. M is the greatest number hidden. (Bao et al. 2022 join several blocks.)
    """
    rows, cols = grid
    u = views.uniform(key, (batch, 5))
    row_N, col_N = np.divmod(np.arange(rows * cols), cols)
    ratio_B1 = 3 ** (2 * u[:, :1] - 1)
    far_BN = jnp.maximum(jnp.abs(row_N - rows * u[:, 1:2] + 0.5) * ratio_B1, jnp.abs(col_N - cols * u[:, 2:3] + 0.5))
    share_B1 = jnp.where(u[:, 3:4] < probability, between(u[:, 4:], *shares), 0)
    most = max(1, round(shares[1] * rows * cols))
    n_B1 = jnp.minimum(jnp.round(share_B1 * rows * cols), most)
    order_BN = jnp.argsort(far_BN, 1)
    hidden_BN = jnp.argsort(order_BN, 1) < n_B1
    weight_BM = (jnp.arange(most) < n_B1) / jnp.maximum(n_B1, 1)
    return hidden_BN, order_BN[:, :most], weight_BM
