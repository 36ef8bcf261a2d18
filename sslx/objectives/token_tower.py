"""Vision transformers with heads on their class token and on their patches.

N images of all crops, T tokens, M chosen patches, K prototypes, D features.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sslx.config import UserError
from sslx.models.heads import Prototypes, dino_mlp
from sslx.models.vit import VisionTransformer


class Head(nn.Module):
    """The MLP and the prototypes of DINO: logits [..., K]. batch_norm: between the layers of the MLP."""

    hidden: int
    bottleneck: int
    n_prototypes: int
    dtype: Any
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x):
        mlp = dino_mlp(self.hidden, self.bottleneck, self.dtype, self.batch_norm)
        return Prototypes(self.n_prototypes, self.dtype, name="prototypes")(mlp(x, train=True))


class Tokens(NamedTuple):
    """What a network and its heads make of images: class tokens [N, D] and patches [N, T, D], and their logits."""

    cls: jax.Array
    patches: jax.Array
    cls_logits: jax.Array
    patch_logits: jax.Array | None


class TokenTower(NamedTuple):
    """A vision transformer with heads "head" for its class token and, if not the same, "patch_head" for its patches.

    Heads have a part in training alone: running statistics of theirs are not kept.
    """

    backbone: VisionTransformer
    heads: Mapping[str, Head]

    def of(self, params):
        return params

    def init(self, key, images):
        """(params, stats, of which there are none)"""
        keys, (height, width) = jax.random.split(key, 3), images.shape[1:3]
        p = self.backbone.patch
        hidden = jnp.zeros((len(images), (height // p) * (width // p)), bool)
        params = {"encoder": self.backbone.init(keys[0], images, None, hidden)["params"]}
        x = jnp.zeros((1, self.backbone.width))
        for head_key, (name, head) in zip(keys[1:], self.heads.items(), strict=False):
            params[name] = head.init(head_key, x)["params"]
        return params, {"encoder": {}}

    def __call__(self, params, images, hidden=None, ids_NM=None, key=None) -> Tokens:
        """`ids_NM`: the patches that get logits."""
        rngs = {} if key is None else {"drop": key}
        x: Any = self.backbone.apply({"params": params["encoder"]}, images, None, hidden, rngs=rngs)
        cls, patches = x[:, 0], x[:, 1:]
        patch_logits: Any = None
        logits = self.scored("head", params, cls)
        if ids_NM is not None:
            chosen = jnp.take_along_axis(patches, ids_NM[..., None], 1)
            patch_logits = self.scored("patch_head" if "patch_head" in self.heads else "head", params, chosen)
        return Tokens(cls, patches, logits, patch_logits)

    def scored(self, name, params, x) -> Any:
        return self.heads[name].apply({"params": params[name]}, x, mutable=["batch_stats"])[0]


def check_tokens(model: VisionTransformer, global_view: Mapping[str, Any]) -> None:
    """Raises UserError for a network without a class token, or for views not of its size."""
    if model.pool != "cls":
        raise UserError("config.objective compares class tokens beside patches: it takes model.pool='cls'")
    size = model.grid[0] * model.patch
    if global_view.get("size") != size:
        raise UserError(f"config.objective.global_view.size={global_view.get('size')} must be model.image_size={size}")
