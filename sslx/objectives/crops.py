"""The crops of an image that joint embeddings compare.

B batch, V large crops.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from sslx import config
from sslx.config import UserError
from sslx.objectives import Batch
from sslx.views import separate
from sslx.views.image import View, augmentation, crop_keys, multi_crop, to_float

SHOWN = 4  # small crops in the report


class Crops(NamedTuple):
    """What is compared of an image: a large crop of each of these kinds, and `n_small` of another."""

    large: Sequence[View]
    small: View | None = None
    n_small: int = 0

    def __call__(self, key, images_BHWC):
        """([B V, S, S, C], [B n_small, s, s, C]), the second None if there are none."""
        return multi_crop(key, images_BHWC, self.large, self.small, self.n_small)

    def where(self, key, images_BHWC):
        """The boxes of the large crops that this key draws, of each kind [B]."""
        keys, _ = crop_keys(key, len(self.large), self.small is not None and self.n_small > 0)
        return [view.where(k, images_BHWC) for k, view in zip(keys, self.large, strict=True)]

    def show(self, key, images_BHWC):
        """{caption: images} for the report."""
        large, small = self(key, images_BHWC)
        shown = {"input": to_float(images_BHWC)}
        shown |= {f"view {i + 1}": crop for i, crop in enumerate(separate(large, len(self.large)))}
        if small is not None:
            shown |= {f"small view {i + 1}": crop for i, crop in enumerate(separate(small, self.n_small)[:SHOWN])}
        return shown


def pair(view: dict[str, Any], second: dict[str, Any] | None, name: str = "view") -> Crops:
    """Two views by the arguments of `views.image.augmentation`; `second` is what is otherwise in the second.

    name: of the first in config.objective.

    Raises UserError if that is its size.
    """
    other = view | (second or {})
    if other.get("size") != view.get("size"):
        raise UserError(f"config.objective.second.size={other['size']} must be config.objective.{name}.size="
                        f"{view.get('size')}: both views of an image are embedded together")
    return Crops([config.call(augmentation, view, f"config.objective.{name}"),
                  config.call(augmentation, other, "config.objective.second")])


class Drawn(NamedTuple):
    """What a loss sees of a batch: its large crops [B V, S, S, C], its small ones or None, itself, and a key.

    crops: the key that `Crops` has drawn them by; None where aux begins, with a first crop alone.
    """

    large: jax.Array
    small: jax.Array | None
    batch: Batch
    key: jax.Array
    crops: jax.Array | None


def multi(global_view: dict[str, Any], second: dict[str, Any] | None, local_view: dict[str, Any],
          n_local: int) -> Crops:
    """A `pair` of global views, and `n_local` local ones."""
    local = config.call(augmentation, local_view, "config.objective.local_view")
    return pair(global_view, second, "global_view")._replace(small=local, n_small=n_local)
