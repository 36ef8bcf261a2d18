"""The vision transformer (Dosovitskiy et al. 2021): patches as tokens, with or without a class token and registers.

B batch, H W C image, N patches, P values of a patch, D model.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sslx.config import Count, Natural, Positive, Share, UserError
from sslx.layers import Linear, Norm, Remat, Stack, weight
from sslx.models import Backbone, Base, check_heads
from sslx.sharding import gather, spec, whole
from sslx.views.image import normalize, patchify

ROPE_2D = 100.0  # the base of rotary positions in images (DINOv3)


def sincos_2d(rows: int, cols: int, width: int) -> np.ndarray:
    """Fixed positions float32 [rows * cols, width]: sines and cosines of the row, then of the column."""
    frequency = 10_000.0 ** (-np.arange(width // 4) / (width // 4))

    def axis(n):
        angle = np.arange(n)[:, None] * frequency
        return np.concatenate([np.sin(angle), np.cos(angle)], 1)

    by_row = np.repeat(axis(rows), cols, 0)
    by_col = np.tile(axis(cols), (rows, 1))
    return np.concatenate([by_row, by_col], 1).astype(np.float32)


def rope_2d(rows: int, cols: int) -> np.ndarray:
    """Angles float32 [rows * cols, 2] of the row and the column, from -2 pi to 2 pi, whatever the size (DINOv3)."""
    row_N, col_N = ((2 * np.arange(n) + 1) / n - 1 for n in (rows, cols))
    return 2 * np.pi * np.stack([np.repeat(row_N, cols), np.tile(col_N, rows)], 1).astype(np.float32)


class VisionTransformer(Backbone):
    """Tokens [B, (1 +) N, D], normed, of images [B, H, W, C] in [0, 1]; a class token comes first.

    Images of another size than `grid` patches get learned positions resized, others computed.
    `registers` are further tokens that blocks may write to, and nobody reads (Darcet et al. 2024).
    """

    patch: int
    grid: tuple[int, int]
    width: int
    depth: int
    block: dict[str, Any]
    pool: Literal["cls", "mean"]
    position: Literal["learned", "sincos", "rope"]
    registers: int
    scan: bool
    remat: Remat
    dtype: Any
    base: Base

    @nn.compact
    def __call__(self, images_BHWC, keep_BN=None, hidden_BN=None):
        """`keep_BN`: int ids of the only patches to look at; the others cost nothing.

        `hidden_BN`: bool, patches in whose place a learned token is seen.
        """
        grid = tuple(side // self.patch for side in images_BHWC.shape[1:3])
        patches_BNP = patchify(normalize(images_BHWC), self.patch)
        rotary = self.position == "rope"
        positions_1ND = jnp.asarray(rope_2d(*grid))[None] if rotary else self.positions(grid)
        if keep_BN is not None:
            patches_BNP = jnp.take_along_axis(patches_BNP, keep_BN[..., None], 1)
            positions_1ND = positions_1ND[0].at[keep_BN].get(out_sharding=spec("batch"))
        x_BND = Linear(self.width, (None, "embed"), dtype=self.dtype, name="embed")(patches_BNP)
        if hidden_BN is not None:
            x_BND = jnp.where(hidden_BN[..., None], self.tokens("mask", len(x_BND), 1), x_BND)
        if not rotary:
            x_BND = x_BND + positions_1ND.astype(self.dtype)
        n_cls, beside = int(self.pool == "cls"), int(self.pool == "cls") + self.registers
        first = [self.tokens(name, len(x_BND), n) for name, n in (("cls", n_cls), ("registers", self.registers)) if n]
        x_BND = jnp.concatenate([*first, x_BND], 1)
        stack = Stack(self.depth, self.block, self.scan, self.remat, self.base.depth, name="stack")
        # What is no patch is nowhere, and not turned.
        turned = dict(positions=jnp.pad(positions_1ND, ((0, 0), (beside, 0), (0, 0)))) if rotary else {}
        x_BND = whole(Norm(self.block["norm"], name="norm")(stack(x_BND, mask="bidirectional", **turned)))
        return jnp.concatenate([x_BND[:, :n_cls], x_BND[:, beside:]], 1) if self.registers else x_BND

    def tokens(self, name: str, batch: int, n: int):
        """`n` learned tokens, the same for every image."""
        shape = (self.width,) if n == 1 else (n, self.width)
        token_D = weight(self, name, nn.initializers.normal(0.02), shape, (None,) * len(shape)).astype(self.dtype)
        return jnp.broadcast_to(token_D, (batch, n, self.width), out_sharding=spec("batch"))

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

    def maps(self, images_BHWC, *, train: bool = False):
        """The features, and the patches, [B, h, w, D]."""
        del train
        rows, cols = (side // self.patch for side in images_BHWC.shape[1:3])
        tokens_BND = self(images_BHWC)
        return self.features(tokens_BND), tokens_BND[:, -rows * cols:].reshape(-1, rows, cols, self.width)


def make(*, image_size: Count, patch: Count, width: Count, depth: Count, heads: Count, hidden: Count | None = None,
         pool: Literal["cls", "mean"] = "cls", position: Literal["learned", "sincos", "rope"] = "learned",
         registers: Natural = 0, norm: Literal["layer", "rms"] = "layer", mlp: Literal["gelu", "swiglu"] = "gelu",
         bias: bool = True, qk_norm: bool = False, layer_scale: Positive | None = None, drop: Share = 0.0,
         drop_group: Count = 8, scan: bool = True, remat: Remat = "none",
         dtype: Literal["float32", "bfloat16"] = "bfloat16",
         base: dict[str, Any] | None = None) -> VisionTransformer:
    """A vision transformer for images of `image_size` pixels a side (others are possible: multi-crop).

    position:    "rope" turns queries and keys by row and column, and adds nothing (Heo et al. 2024).
    registers:   tokens beside the patches that hold what concerns all of the image (Darcet et al. 2024).
    layer_scale: of the branches of a block, at birth: 1e-5 in DINOv2.
    drop:        the share of rows that skip a branch in training, of every `drop_group` rows as many as is nearest to
                 it; what is skipped is not computed.
    base: width, depth, heads, hidden at which the optimizer's hyper-parameters were tuned; what is left out is as here.
          With it the network is in muP and CompleteP (sslx/mup.py).

    Raises UserError if `patch` does not divide `image_size`, or heads or sines do not fit the width.
    """
    check_heads(width, heads)
    n_dropped = round(drop * drop_group)
    if n_dropped == drop_group or (drop > 0) != (n_dropped > 0):
        raise UserError(f"model.drop={drop} of model.drop_group={drop_group} rows is {n_dropped}: choose a group in"
                        " which some rows skip a branch, and some do not")
    if position == "rope" and width // heads % 4:
        raise UserError(f"rotary positions turn a pair for the row and one for the column, and model.width={width} over"
                        f" model.heads={heads} is no multiple of 4")
    if image_size % patch:
        raise UserError(f"model.patch={patch} does not divide model.image_size={image_size};"
                        f" the divisors are {[p for p in range(1, image_size + 1) if image_size % p == 0]}")
    if position == "sincos" and width % 4:
        raise UserError(f"model.width={width} must be a multiple of 4 for 2-D sine-cosine positions")
    tuned = Base.of(base, width=width, depth=depth, heads=heads, hidden=hidden)
    block = dict(heads=heads, head_growth=width / heads / tuned.head, hidden=hidden, norm=norm, mlp=mlp, bias=bias,
                 qk_norm=qk_norm, rope=ROPE_2D if position == "rope" else None, layer_scale=layer_scale,
                 drop=(n_dropped, drop_group), dtype=jnp.dtype(dtype))
    return VisionTransformer(patch, (image_size // patch,) * 2, width, depth, block, pool, position, registers, scan,
                             remat, jnp.dtype(dtype), tuned)
