"""The vision transformer (Dosovitskiy et al. 2021): patches as tokens, with or without a class token.

B batch, H W C image, N patches, P values of a patch, D model.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sslx.config import Count, UserError
from sslx.layers import Linear, Norm, Remat, Stack, weight
from sslx.models import Backbone, Base, check_heads
from sslx.sharding import gather, spec, whole
from sslx.views.image import normalize, patchify


def sincos_2d(rows: int, cols: int, width: int) -> np.ndarray:
    """Fixed positions float32 [rows * cols, width]: sines and cosines of the row, then of the column."""
    frequency = 10_000.0 ** (-np.arange(width // 4) / (width // 4))

    def axis(n):
        angle = np.arange(n)[:, None] * frequency
        return np.concatenate([np.sin(angle), np.cos(angle)], 1)

    by_row = np.repeat(axis(rows), cols, 0)
    by_col = np.tile(axis(cols), (rows, 1))
    return np.concatenate([by_row, by_col], 1).astype(np.float32)


class VisionTransformer(Backbone):
    """Tokens [B, (1 +) N, D], normed, of images [B, H, W, C] in [0, 1]; a class token comes first.

    Images of another size than `grid` patches get learned positions resized, fixed ones computed.
    """

    patch: int
    grid: tuple[int, int]
    width: int
    depth: int
    block: dict[str, Any]
    pool: Literal["cls", "mean"]
    position: Literal["learned", "sincos"]
    scan: bool
    remat: Remat
    dtype: Any
    base: Base

    @nn.compact
    def __call__(self, images_BHWC, keep_BN=None):
        """`keep_BN`: int ids of the only patches to look at; the others cost nothing."""
        grid = tuple(side // self.patch for side in images_BHWC.shape[1:3])
        patches_BNP = patchify(normalize(images_BHWC), self.patch)
        positions_1ND = self.positions(grid)
        if keep_BN is not None:
            patches_BNP = jnp.take_along_axis(patches_BNP, keep_BN[..., None], 1)
            positions_1ND = positions_1ND[0].at[keep_BN].get(out_sharding=spec("batch"))
        x_BND = Linear(self.width, (None, "embed"), dtype=self.dtype, name="embed")(patches_BNP)
        x_BND = x_BND + positions_1ND.astype(self.dtype)
        if self.pool == "cls":
            cls_D = weight(self, "cls", nn.initializers.normal(0.02), (self.width,), (None,)).astype(self.dtype)
            cls_B1D = jnp.broadcast_to(cls_D, (len(x_BND), 1, self.width), out_sharding=spec("batch"))
            x_BND = jnp.concatenate([cls_B1D, x_BND], 1)
        stack = Stack(self.depth, self.block, self.scan, self.remat, self.base.depth, name="stack")
        x_BND = stack(x_BND, mask="bidirectional")
        return whole(Norm(self.block["norm"], name="norm")(x_BND))

    def positions(self, grid):
        if self.position == "sincos":
            return jnp.asarray(sincos_2d(*grid, self.width))[None]
        shape = (*self.grid, self.width)
        table = gather(weight(self, "position_embedding", nn.initializers.normal(0.02), shape, (None, None, "embed"),
                              stacked=2))
        if grid != self.grid:
            table = jax.image.resize(table, (*grid, self.width), "cubic")
        return table.reshape(1, -1, self.width)

    def features(self, tokens_BND):
        """One vector per image, [B, D]: the class token, or the mean of the patches."""
        return tokens_BND[:, 0] if self.pool == "cls" else tokens_BND.mean(1)

    def encode(self, images_BHWC, *, train: bool = False):
        """The features of images: what a backbone offers (`train` matters to networks with batch statistics)."""
        del train
        return self.features(self(images_BHWC))


def make(*, image_size: Count, patch: Count, width: Count, depth: Count, heads: Count, hidden: Count | None = None,
         pool: Literal["cls", "mean"] = "cls", position: Literal["learned", "sincos"] = "learned",
         norm: Literal["layer", "rms"] = "layer", mlp: Literal["gelu", "swiglu"] = "gelu", bias: bool = True,
         qk_norm: bool = False, scan: bool = True, remat: Remat = "none",
         dtype: Literal["float32", "bfloat16"] = "bfloat16",
         base: dict[str, Any] | None = None) -> VisionTransformer:
    """A vision transformer for images of `image_size` pixels a side (others are possible: multi-crop).

    base: width, depth, heads, hidden at which the optimizer's hyper-parameters were tuned; what is left out is as here.
          With it the network is in muP and CompleteP (sslx/mup.py).

    Raises UserError if `patch` does not divide `image_size`, or heads or sines do not fit the width.
    """
    check_heads(width, heads)
    if image_size % patch:
        raise UserError(f"model.patch={patch} does not divide model.image_size={image_size};"
                        f" the divisors are {[p for p in range(1, image_size + 1) if image_size % p == 0]}")
    if position == "sincos" and width % 4:
        raise UserError(f"model.width={width} must be a multiple of 4 for 2-D sine-cosine positions")
    tuned = Base.of(base, width=width, depth=depth, heads=heads, hidden=hidden)
    block = dict(heads=heads, head_growth=width / heads / tuned.head, hidden=hidden, norm=norm, mlp=mlp, bias=bias,
                 qk_norm=qk_norm, dtype=jnp.dtype(dtype))
    return VisionTransformer(patch, (image_size // patch,) * 2, width, depth, block, pool, position, scan, remat,
                             jnp.dtype(dtype), tuned)
