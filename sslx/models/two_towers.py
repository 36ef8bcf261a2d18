"""A network for images and one for their captions, for objectives that bring pairs together."""

from typing import Any, Literal, NamedTuple

from sslx import config
from sslx.config import UserError
from sslx.models import Backbone
from sslx.models.transformer import Transformer


class TwoTowers(NamedTuple):
    """What a pair is embedded by."""

    image: Backbone
    text: Transformer
    dtype: Any

    @property
    def modality(self) -> str:
        return "image_text"


def make(*, image: dict[str, Any], text: dict[str, Any],
         dtype: Literal["float32", "bfloat16"] = "bfloat16") -> TwoTowers:
    """Two networks, each a section as config.model is, with a name of sslx/models; both compute in `dtype`.

    Raises UserError if the one reads no images, or the other is no transformer over tokens.
    """
    towers = {}
    for name, section, kind in (("image", image, Backbone), ("text", text, Transformer)):
        where = f"config.model.{name}"
        if "dtype" in section:
            raise UserError(f"unknown key {where}.dtype: config.model.dtype is that of both towers")
        if section.get("base") is not None:
            raise UserError(f"{where}.base: two towers are not offered in muP; tune them at their own size")
        towers[name] = config.build("models", {**section, "dtype": dtype}, where)
        if not isinstance(towers[name], kind):
            raise UserError(f"{where}.name={section.get('name')!r} is no network of {name}s that gives features")
    return TwoTowers(**towers, dtype=towers["image"].dtype)
