"""SimCLR: agree between two views of an image, against all other images of the global batch (Chen et al. 2020).

B batch, D projection.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from sslx import config
from sslx.data import Info
from sslx.models import encode as encode_images
from sslx.models.heads import Projector, unit
from sslx.objectives import Objective
from sslx.objectives.image import grid_patches
from sslx.sharding import replicate
from sslx.views.image import augmentation, multi_view, to_float


def nt_xent(a_BD, b_BD, temperature: float):
    """Normalized temperature-scaled cross-entropy of pairs (a_i, b_i), unit vectors; a number.

    l(a_i) = -log exp(a_i.b_i / t) / (sum_{j != i} exp(a_i.a_j / t) + sum_j exp(a_i.b_j / t)),
    averaged over all 2 B vectors.
    """
    chex.assert_equal_shape([a_BD, b_BD])

    def side(q_BD, other_BD):
        own_BB = jnp.where(jnp.eye(len(q_BD), dtype=bool), -jnp.inf, q_BD @ replicate(q_BD).T)
        logits = jnp.concatenate([own_BB, q_BD @ replicate(other_BD).T], 1) / temperature
        return (jax.nn.logsumexp(logits, 1) - (q_BD * other_BD).sum(1) / temperature).mean()

    return (side(a_BD, b_BD) + side(b_BD, a_BD)) / 2


def make(model, info: Info, *, view: dict[str, Any], temperature: float = 0.1, hidden: int = 2048,
         features: int = 128, depth: int = 2) -> Objective:
    """SimCLR with a projector of `depth` layers; `view` holds the arguments of `views.image.augmentation`."""
    augment = config.call(augmentation, view, "config.objective.view")
    projector = Projector(hidden, features, depth, model.dtype)

    def init(key, batch):
        key_encoder, key_projector = jax.random.split(key)
        encoder = dict(model.init(key_encoder, augment(key, batch["image"]), train=True, method="encode"))
        h_BD = model.apply(encoder, augment(key, batch["image"]), train=False, method="encode")
        head = dict(projector.init(key_projector, h_BD, train=True))
        params = {"encoder": encoder.pop("params"), "projector": head.pop("params")}
        return params, {"encoder": encoder, "projector": head}

    def loss(params, aux, batch, key):
        images = multi_view(key, batch["image"], [augment, augment])
        with jax.named_scope("encoder"):
            h_VD, encoder = encode_images(model, params["encoder"], aux["encoder"], images, train=True)
        with jax.named_scope("projector"):
            z_VD, head = projector.apply({"params": params["projector"], **aux["projector"]}, h_VD, train=True,
                                         mutable=list(aux["projector"]))
        with jax.named_scope("loss"):
            value = nt_xent(*jnp.split(unit(z_VD), 2), temperature)
        metrics = {"loss": value, "tokens": jnp.int32(len(batch["image"]) * grid_patches(model, info))}
        return value, ({"encoder": encoder, "projector": head}, metrics)

    def encode(params, aux, batch):
        images = to_float(batch["image"])
        return encode_images(model, params["encoder"], aux["encoder"], images, train=False)[0].astype(jnp.float32)

    def show(params, aux, batch, key):
        first, second = jnp.split(multi_view(key, batch["image"], [augment, augment]), 2)
        return {"input": to_float(batch["image"]), "view 1": first, "view 2": second}

    return Objective(init, loss, encode, show)
