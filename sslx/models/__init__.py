"""Networks: Linen modules on `layers.py`, one family a file, each with a `make` whose arguments are its config.

What a network reads is its `modality`, as in `data.Info`.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax

from sslx import config
from sslx.config import Count, UserError


class Backbone(nn.Module):
    """A network of images, which offers `encode(images [B, H, W, C], train=...) -> [B, D]`.

    And, for objectives that compare places, `maps(images, train=...) -> ([B, D], [B, h, w, D])`: the same features,
    and those of a grid of places.
    """

    modality = "image"


def encode(model: Backbone, params: Any, stats: Any, images: jax.Array, *, train: bool,
           key: jax.Array | None = None) -> Any:
    """(features [B, D], stats) of a backbone; with `train`, its batch statistics have moved on.

    key: draws what blocks drop.
    """
    variables = {"params": params, **stats}
    if not train:
        return model.apply(variables, images, train=False, method="encode"), stats
    return model.apply(variables, images, train=True, method="encode", mutable=list(stats),
                       rngs={} if key is None else {"drop": key})


def check_heads(width: int, heads: int, kv_heads: int | None = None, *, rotary: bool = False,
                names: tuple[str, str] = ("model.width", "model.heads")) -> None:
    """Raises UserError unless heads divide the width, groups of keys and values the heads, and pairs a rotary head."""
    w, h = names
    if width % heads:
        raise UserError(f"{w}={width} does not divide into {h}={heads} heads")
    if heads % (kv_heads or heads):
        raise UserError(f"{h}={heads} heads do not divide into model.kv_heads={kv_heads} groups")
    if rotary and (width // heads) % 2:
        raise UserError(f"rotary positions turn pairs, and {w}={width} over {h}={heads} is odd")


class Base(NamedTuple):
    """The sizes of a transformer at which the optimizer's hyper-parameters were tuned (sslx/mup.py)."""

    width: Count
    heads: Count
    depth: Count
    decoder_depth: Count | None = None
    hidden: Count | None = None
    kv_heads: Count | None = None

    @property
    def head(self) -> float:
        """K."""
        return self.width / self.heads

    @classmethod
    def of(cls, base: dict[str, Any] | None, rotary: bool = False, **sizes: int | None) -> "Base":
        """`sizes` of a network, which are all that its `base` may change. Raises UserError if they do not fit."""
        made = config.call(cls, smaller(base, sizes), "config.model.base")
        names = ("model.base.width", "model.base.heads")
        check_heads(made.width, made.heads, made.kv_heads, rotary=rotary, names=names)
        return made


def smaller(base: dict[str, Any] | None, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes of a network, changed by those of its base. Raises UserError for what is no size of it."""
    for key in base or {}:
        if key not in sizes:
            raise UserError(f"unknown key config.model.base.{key}{config.nearest(key, sizes)}")
    return sizes | dict(base or {})
