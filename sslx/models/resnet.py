"""Residual networks (He et al. 2016) with a stem for large or small images.

B batch, H W C image.
"""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from sslx import config, mup
from sslx.config import Count, UserError
from sslx.layers import BatchNorm, Conv
from sslx.models import Backbone, smaller
from sslx.views.image import normalize


class Residual(nn.Module):
    """relu(x + f(x)): two 3x3 convolutions, or the bottleneck 1x1, 3x3, 1x1 with four times the channels.

    blocks: of the stage, and of that of the muP base; f counts as much as there are fewer in the base.
    """

    features: int
    stride: int
    bottleneck: bool
    blocks: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, x, train: bool):
        f, s, d = self.features, self.stride, self.dtype
        plan = [(f, 1, 1), (f, 3, s), (4 * f, 1, 1)] if self.bottleneck else [(f, 3, s), (f, 3, 1)]
        y = x
        with mup.during(mup.stack, self.blocks):
            for i, (features, kernel, stride) in enumerate(plan):
                y = BatchNorm()(Conv(features, kernel, stride, d)(y), train=train)
                y = nn.relu(y) if i < len(plan) - 1 else y
        if x.shape != y.shape:
            x = BatchNorm(name="shortcut_norm")(Conv(y.shape[-1], 1, s, d, name="shortcut")(x), train=train)
        n_blocks, base_blocks = self.blocks
        return nn.relu(x + base_blocks / n_blocks * y)


class StagesBase(NamedTuple):
    """The sizes at which the optimizer's hyper-parameters were tuned (sslx/mup.py)."""

    width: Count
    stages: tuple[Count, ...]

    @classmethod
    def of(cls, base: dict[str, Any] | None, width: int, stages: tuple[int, ...]) -> "StagesBase":
        """These sizes, changed by those of the base. Raises UserError if it has another number of stages."""
        tuned = config.call(cls, smaller(base, dict(width=width, stages=stages)), "config.model.base")
        if len(tuned.stages) != len(stages):
            raise UserError(f"config.model.base.stages={tuned.stages} must be as many as model.stages={stages}, each of"
                            " as many blocks as it had when the optimizer was tuned")
        return tuned


class ResNet(Backbone):
    """Features [B, D] of images [B, H, W, C] in [0, 1]; batch statistics in the collection "batch_stats"."""

    stages: tuple[int, ...]
    width: int
    bottleneck: bool
    stem: Literal["imagenet", "small", "small_stride2"]
    remat: Literal["none", "full"]
    dtype: Any
    base: StagesBase

    def __call__(self, images_BHWC, train: bool):
        return self.maps(images_BHWC, train=train)[0]

    @nn.compact
    def maps(self, images_BHWC, *, train: bool = False):
        """The features, and the last stage, [B, h, w, D], whose mean they are."""
        def root(self, images_BHWC):
            x = normalize(images_BHWC).astype(self.dtype)
            kernel, stride = {"imagenet": (7, 2), "small": (3, 1), "small_stride2": (3, 2)}[self.stem]
            x = Conv(self.width, kernel, stride, self.dtype, name="stem")(x)
            x = nn.relu(BatchNorm(name="stem_norm")(x, train=train))
            return nn.max_pool(x, (3, 3), (2, 2), [(1, 1)] * 2) if self.stem == "imagenet" else x

        def body(block, x):
            return block(x, train)

        if self.remat == "full":
            root, body = nn.remat(root), nn.remat(body)
        x = root(self, images_BHWC)
        for i, n_blocks in enumerate(self.stages):
            for j in range(n_blocks):
                stride = 2 if i and not j else 1
                options = (self.width * 2**i, stride, self.bottleneck, (n_blocks, self.base.stages[i]), self.dtype)
                x = body(Residual(*options, name=f"stage{i}_{j}"), x)
        return x.mean((1, 2), dtype=jnp.float32), x

    def encode(self, images_BHWC, *, train: bool = False):
        """The features of images: what a `Backbone` offers."""
        return self(images_BHWC, train)


def make(*, stages: tuple[Count, ...] = (2, 2, 2, 2), width: Count = 64, bottleneck: bool = False,
         stem: Literal["imagenet", "small", "small_stride2"] = "imagenet",
         remat: Literal["none", "full"] = "none", dtype: Literal["float32", "bfloat16"] = "bfloat16",
         base: dict[str, Any] | None = None) -> ResNet:
    """A residual network.

    stages:     blocks per stage, the first at `width` channels, each further one twice as wide at half the
                resolution. ResNet-18: (2, 2, 2, 2). ResNet-50: (3, 4, 6, 3) with `bottleneck`.
    stem:       "imagenet" 7x7 stride 2 and max pooling; "small" 3x3; "small_stride2" 3x3 stride 2.
    remat:      "none" keeps all activations, "full" the inputs of the stem and of each block.
    base:       width and stages at which the optimizer's hyper-parameters were tuned; what is left out is as here. With
                it the network is in muP, and each stage in CompleteP (sslx/mup.py).

    Raises UserError if the base has another number of stages.
    """
    return ResNet(stages, width, bottleneck, stem, remat, jnp.dtype(dtype), StagesBase.of(base, width, stages))
