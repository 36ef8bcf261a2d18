"""ConvNeXt (Liu et al. 2022): stages of depthwise convolutions, each followed by an MLP over channels.

B batch, H W C image.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from sslx import channels, mup
from sslx.config import Count, Positive, UserError
from sslx.layers import Linear, Norm, matrix, weight
from sslx.models import Backbone
from sslx.models.resnet import StagesBase
from sslx.sharding import gather
from sslx.views.image import normalize, patchify


class Depthwise(nn.Module):
    """Each channel convolved by itself, [B, H, W, C] -> the same."""

    kernel: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC):
        k, C = self.kernel, x_BHWC.shape[-1]
        w = gather(matrix(self, "kernel", (k, k, 1, C), (None, None, None, "embed"), 3).astype(self.dtype))
        y = jax.lax.conv_general_dilated(x_BHWC.astype(self.dtype), w, (1, 1), [(k // 2, k // 2)] * 2,
                                         dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=C)
        return channels.plus(y, weight(self, "bias", nn.initializers.zeros, (C,), (None,)).astype(self.dtype))


class Mixing(nn.Module):
    """x + g * W_2 gelu(W_1 norm(depthwise(x))), g for each channel.

    blocks: of the stage, and of that of the muP base; the branch counts as much as there are fewer in the base.
    """

    layer_scale: float
    blocks: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC):
        C = x_BHWC.shape[-1]
        with mup.during(mup.stack, self.blocks):
            y = Norm(name="norm")(Depthwise(7, self.dtype, name="depthwise")(x_BHWC))
            y = nn.gelu(Linear(4 * C, (None, "embed"), dtype=self.dtype, name="up")(y))
            y = Linear(C, ("embed", None), dtype=self.dtype, name="down")(y)
        y = channels.times(y, weight(self, "scale", nn.initializers.constant(self.layer_scale), (C,), (None,)))
        return x_BHWC + (self.blocks[1] / self.blocks[0] * y).astype(x_BHWC.dtype)


class ConvNeXt(Backbone):
    """Features [B, D] of images [B, H, W, C] in [0, 1]."""

    stages: tuple[int, ...]
    width: int
    stem: int
    layer_scale: float
    remat: Literal["none", "full"]
    dtype: Any
    base: StagesBase

    def __call__(self, images_BHWC):
        return self.maps(images_BHWC)[0]

    @nn.compact
    def maps(self, images_BHWC, *, train: bool = False):
        """The features, and the last stage, [B, h, w, D], whose normed mean they are."""
        del train
        x, body = normalize(images_BHWC).astype(self.dtype), lambda block, x: block(x)
        if self.remat == "full":
            body = nn.remat(body)
        for i, n_blocks in enumerate(self.stages):
            side, width = self.stem if i == 0 else 2, self.width * 2**i
            if i:
                x = Norm(name=f"reduce{i}_norm")(x)
            x = Linear(width, (None, "embed"), dtype=self.dtype, name=f"reduce{i}" if i else "stem")(tiles(x, side))
            x = x if i else Norm(name="stem_norm")(x)
            for j in range(n_blocks):
                options = (self.layer_scale, (n_blocks, self.base.stages[i]), self.dtype)
                x = body(Mixing(*options, name=f"stage{i}_{j}"), x)
        return Norm(name="norm")(x.mean((1, 2), dtype=jnp.float32)), x

    def encode(self, images_BHWC, *, train: bool = False):
        """The features of images: what a `Backbone` offers (`train` matters to networks with batch statistics)."""
        del train
        return self(images_BHWC)


def tiles(x_BHWC, side: int):
    """[B, H / side, W / side, side side C], a rest left out. Raises UserError if nothing is left."""
    B, height, width, _ = x_BHWC.shape
    rows, cols = height // side, width // side
    if not rows * cols:
        raise UserError(f"a stage of config.model cannot reduce {height} x {width} pixels {side} times; choose fewer"
                        " model.stages, a smaller model.stem or larger images (or views)")
    return patchify(x_BHWC[:, :rows * side, :cols * side], side).reshape(B, rows, cols, -1)


def make(*, stages: tuple[Count, ...] = (3, 3, 9, 3), width: Count = 96, stem: Count = 4,
         layer_scale: Positive = 1e-6, remat: Literal["none", "full"] = "none",
         dtype: Literal["float32", "bfloat16"] = "bfloat16", base: dict[str, Any] | None = None) -> ConvNeXt:
    """A ConvNeXt, by its defaults the tiny one.

    stages:      blocks per stage, the first at `width` channels, each further one twice as wide at half the resolution.
    stem:        pixels of a side of the patches that the first stage sees.
    layer_scale: of the branch of a block, at birth.
    remat:       "none" keeps all activations, "full" the inputs of each block.
    base:        width and stages at which the optimizer's hyper-parameters were tuned; what is left out is as here.

    Raises UserError if the base has another number of stages.
    """
    return ConvNeXt(stages, width, stem, layer_scale, remat, jnp.dtype(dtype),
                    StagesBase.of(base, width, stages))
