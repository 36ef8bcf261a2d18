"""What joint-embedding objectives share: the crops of an image, towers that embed them, teachers that follow.

B batch, V views, D features; N = B V rows, the views of an image side by side (sslx/views).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from sslx import config
from sslx.config import UserError
from sslx.data import Info
from sslx.models import Backbone
from sslx.models import encode as encode_images
from sslx.models.heads import unit
from sslx.objectives import Objective
from sslx.objectives.image import check_images, grid_patches
from sslx.views import separate
from sslx.views.image import View, augmentation, multi_crop, to_float

SHOWN = 4  # small crops in the report


class Crops(NamedTuple):
    """What is compared of an image: a large crop of each of these kinds, and `n_small` of another."""

    large: Sequence[View]
    small: View | None = None
    n_small: int = 0

    def __call__(self, key, images_BHWC):
        """([B V, S, S, C], [B n_small, s, s, C]), the second None if there are none."""
        return multi_crop(key, images_BHWC, self.large, self.small, self.n_small)

    def show(self, key, images_BHWC):
        """{caption: images} for the report."""
        large, small = self(key, images_BHWC)
        shown = {"input": to_float(images_BHWC)}
        shown |= {f"view {i + 1}": crop for i, crop in enumerate(separate(large, len(self.large)))}
        if small is not None:
            shown |= {f"small view {i + 1}": crop for i, crop in enumerate(separate(small, self.n_small)[:SHOWN])}
        return shown


def pair(view: dict[str, Any], second: dict[str, Any] | None) -> Crops:
    """Two views by the arguments of `views.image.augmentation`; `second` is what is otherwise in the second.

    Raises UserError if that is its size.
    """
    other = view | (second or {})
    if other.get("size") != view.get("size"):
        raise UserError(f"config.objective.second.size={other['size']} must be config.objective.view.size="
                        f"{view.get('size')}: both views of an image are embedded together")
    return Crops([config.call(augmentation, view, "config.objective.view"),
                  config.call(augmentation, other, "config.objective.second")])


class Tower(NamedTuple):
    """A backbone, which is "encoder", and heads by name, each on what is before it: `head(x_ND, train=True)`.

    Parameters and batch statistics are {name: those of the part}.
    """

    backbone: Backbone
    heads: Mapping[str, nn.Module]

    @property
    def parts(self) -> list[tuple[str, nn.Module, dict[str, Any]]]:
        """(name, module, options of a call)."""
        heads = [(name, head, {"train": True}) for name, head in self.heads.items()]
        return [("encoder", self.backbone, {"train": True, "method": "encode"}), *heads]

    def of(self, larger):
        """The share of this tower in the parameters or statistics of one with more heads."""
        return {name: larger[name] for name, _, _ in self.parts}

    def init(self, key, images):
        """(params, stats)"""
        params, stats, x = {}, {}, images
        for key_part, (name, part, options) in zip(jax.random.split(key, len(self.parts)), self.parts, strict=True):
            stats[name] = dict(part.init(key_part, x, **options))
            x = part.apply(stats[name], x, **options | {"train": False})
            params[name] = stats[name].pop("params")
        return params, stats

    def __call__(self, params, stats, images):
        """({name: what the part makes of the images, [N, D]}, stats moved on)"""
        made, moved, x = {}, {}, images
        for name, part, options in self.parts:
            with jax.named_scope(name):
                x, moved[name] = part.apply({"params": params[name], **stats[name]}, x, mutable=list(stats[name]),
                                            **options)
            made[name] = x
        return made, moved


def products(a_BD, b_BE):
    """a^T b, float32 [D, E]: sums over the global batch, whole on every device."""
    return jnp.einsum("bd,be->de", a_BD, b_BE, precision="highest", out_sharding=jax.sharding.PartitionSpec())


def off_diagonal_squares(c_DD):
    """sum_{i != j} c_ij^2"""
    return jnp.square(c_DD).sum() - jnp.square(jnp.diagonal(c_DD)).sum()


def negative_cosine(p_BD, z_BD):
    """Mean over rows of -cos(p, z) of a prediction and its target z, which gets no gradient."""
    chex.assert_equal_shape([p_BD, z_BD])
    return -(unit(p_BD) * jax.lax.stop_gradient(unit(z_BD))).sum(-1).mean()


def moving_average(old, new, momentum):
    """m old + (1 - m) new, leaf by leaf, without a gradient."""
    return jax.tree.map(lambda o, n: momentum * o + (1 - momentum) * jax.lax.stop_gradient(n), old, new)


def cosine(step, steps: int, first: float, last: float):
    """From `first` to `last` along half a cosine over `steps` steps."""
    progress = jnp.minimum(step / steps, 1.0)
    return last + (first - last) * (1 + jnp.cos(jnp.pi * progress)) / 2


def objective(tower: Tower, info: Info, crops: Crops, loss: Callable,
              begin: Callable = lambda params, stats: {"stats": stats},
              judged: Callable = lambda params, aux: (params["encoder"], aux["stats"]["encoder"])) -> Objective:
    """The objective of a tower's parameters.

    loss:   (params, aux, (large, small)) -> (loss, aux), of the crops.
    begin:  (params, stats) -> aux.
    judged: (params, aux) -> (parameters, statistics) of the backbone whose features are evaluated.
    """
    check_images(tower.backbone, info)
    patches = grid_patches(tower.backbone, info)

    def init(key, batch):
        params, stats = tower.init(key, crops.large[0](key, batch["image"]))
        return params, begin(params, stats)

    def measured(params, aux, batch, key):
        value, aux = loss(params, aux, crops(key, batch["image"]))
        return value, (aux, {"loss": value, "tokens": jnp.int32(len(batch["image"]) * patches)})

    def encode(params, aux, batch):
        images = to_float(batch["image"])
        return encode_images(tower.backbone, *judged(params, aux), images, train=False)[0].astype(jnp.float32)

    return Objective(init, measured, encode, lambda params, aux, batch, key: crops.show(key, batch["image"]))
