"""What joint-embedding objectives share: the crops of an image, and towers that embed them.

B batch, V views, D features; N = B V rows, the views of an image side by side (sslx/views).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from sslx.data import Info
from sslx.models import Backbone
from sslx.models import encode as encode_images
from sslx.models.heads import unit
from sslx.objectives import Objective
from sslx.objectives.crops import Crops, Drawn
from sslx.objectives.image import check_images, grid_patches
from sslx.views import separate
from sslx.views.image import to_float


class Embeds(Protocol):
    """A tower, as far as all objectives know it: parameters by the name of the part, "encoder" among them."""

    @property
    def backbone(self) -> Backbone: ...
    def init(self, key: Any, images: Any) -> tuple[Any, Any]: ...
    def of(self, larger: Any) -> Any: ...


class Tower(NamedTuple):
    """A backbone, which is "encoder", and heads by name, each on what is before it: `head(x_ND, train=True)`.

    Parameters and batch statistics are {name: those of the part}. `method`: of the backbone.
    """

    backbone: Backbone
    heads: Mapping[str, nn.Module]
    method: str = "encode"

    @property
    def parts(self) -> list[tuple[str, nn.Module, dict[str, Any]]]:
        """(name, module, options of a call)."""
        heads = [(name, head, {"train": True}) for name, head in self.heads.items()]
        return [("encoder", self.backbone, {"train": True, "method": self.method}), *heads]

    def of(self, larger):
        """The share of this tower in the parameters or statistics of one with more heads."""
        return {name: larger[name] for name, _, _ in self.parts}

    def init(self, key, images):
        """(params, stats)"""
        params, stats, x = {}, {}, images
        for key_part, (name, part, options) in zip(jax.random.split(key, len(self.parts)), self.parts, strict=True):
            stats[name] = dict(part.init(key_part, x, **options))
            x = part.apply(stats[name], x, **options | {"train": False})
            params[name] = stats[name].pop("params", {})  # a head may have none
        return params, stats

    def __call__(self, params, stats, images, key=None):
        """({name: what the part makes of the images, [N, D]}, stats moved on); what blocks drop, `key` draws."""
        made, moved, x = {}, {}, images
        for name, part, options in self.parts:
            with jax.named_scope(name):
                x, moved[name] = part.apply({"params": params[name], **stats[name]}, x, mutable=list(stats[name]),
                                            rngs={} if key is None else {"drop": key}, **options)
            made[name] = x
        return made, moved

    def project(self, params, stats, images):
        """What the first head makes of images, [N, D]; of a head for wholes and places, what it makes of wholes."""
        made, _ = self(params, stats, images)
        return jax.tree.leaves(made[next(iter(self.heads))])[0].astype(jnp.float32)


def embedded(tower: Tower, params, stats, crops: Crops, drawn: Drawn):
    """({name: what the part makes of each crop, [B, D] each, large ones first}, stats moved on)

    Heads see either size by itself, and so have its batch statistics.
    """
    found: dict[str, list[jax.Array]] = {name: [] for name, _, _ in tower.parts}
    for i, (images, n) in enumerate(((drawn.large, len(crops.large)), (drawn.small, crops.n_small))):
        if images is not None:
            with jax.named_scope("student"):
                made, stats = tower(params, stats, images, jax.random.fold_in(drawn.key, i))
            for name, x in made.items():
                found[name] += separate(x, n)
    return found, stats


def products(a_BD, b_BE):
    """a^T b, float32 [D, E]: sums over the global batch, whole on every device; of [B, M, D] each m by itself."""
    return jnp.einsum("b...d,b...e->...de", a_BD, b_BE, precision="highest", out_sharding=jax.sharding.PartitionSpec())


def off_diagonal_squares(c_DD):
    """sum_{i != j} c_ij^2, of all matrices [..., D, D]."""
    return jnp.square(c_DD).sum() - jnp.square(jnp.diagonal(c_DD, axis1=-2, axis2=-1)).sum()


def mean_cosine(a_BD, b_BD):
    """Mean over rows of cos(a, b)."""
    chex.assert_equal_shape([a_BD, b_BD])
    return (unit(a_BD) * unit(b_BD)).sum(-1).mean()


def objective(tower: Embeds, info: Info, crops: Crops, loss: Callable,
              begin: Callable = lambda params, stats, drawn: {"stats": stats},
              judged: Callable = lambda params, aux: (params["encoder"], aux["stats"]["encoder"]),
              reads: tuple[str, ...] = ()) -> Objective:
    """The objective of a tower's parameters.

    loss:   (params, aux, drawn) -> (loss, aux).
    begin:  (params, stats, drawn) -> aux.
    judged: (params, aux) -> (parameters, statistics) of the backbone whose features are evaluated.
    reads:  as of `Objective`.
    """
    check_images(tower.backbone, info)
    patches = grid_patches(tower.backbone, info)

    def init(key, batch):
        key_view, key_tower, key_aux = jax.random.split(key, 3)
        first = crops.large[0](key_view, batch["image"])
        params, stats = tower.init(key_tower, first)
        return params, begin(params, stats, Drawn(first, None, batch, key_aux, None))

    def measured(params, aux, batch, key):
        key_crops, key_loss = jax.random.split(key)
        value, aux = loss(params, aux, Drawn(*crops(key_crops, batch["image"]), batch, key_loss, key_crops))
        return value, (aux, {"loss": value, "tokens": jnp.int32(len(batch["image"]) * patches)})

    def encode(params, aux, batch):
        images = to_float(batch["image"])
        return encode_images(tower.backbone, *judged(params, aux), images, train=False)[0].astype(jnp.float32)

    of_tower = tower.project if isinstance(tower, Tower) else None
    project = of_tower and (lambda params, aux, batch: of_tower(params, aux["stats"], to_float(batch["image"])))
    return Objective(init, measured, encode, lambda params, aux, batch, key: crops.show(key, batch["image"]), reads,
                     project, of_batch=True)
