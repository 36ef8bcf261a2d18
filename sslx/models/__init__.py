"""Networks: Linen modules on `layers.py`, one family a file, each with a `make` whose arguments are its config.

An image backbone offers `encode(images, train=...) -> [B, D]`.
"""

from typing import Any

import flax.linen as nn
import jax


def encode(model: nn.Module, params: Any, stats: Any, images: jax.Array, *, train: bool) -> Any:
    """(features [B, D], stats) of a backbone; with `train`, its batch statistics have moved on."""
    variables = {"params": params, **stats}
    if not train:
        return model.apply(variables, images, train=False, method="encode"), stats
    return model.apply(variables, images, train=True, method="encode", mutable=list(stats))
