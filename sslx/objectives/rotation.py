"""Rotation prediction: tell by which multiple of 90 degrees an image was turned (Gidaris et al. 2018)."""

import jax
import jax.numpy as jnp

from sslx.data import Info
from sslx.layers import Linear, cross_entropy
from sslx.models import Backbone
from sslx.models import encode as encode_images
from sslx.objectives import Objective
from sslx.objectives.image import check_images, grid_patches
from sslx.views import interleave
from sslx.views.image import to_float


def make(model: Backbone, info: Info) -> Objective:
    """Four turns of every image, a linear head that tells them apart."""
    check_images(model, info)
    head = Linear(4, ("embed", None))

    def init(key, batch):
        key_encoder, key_head = jax.random.split(key)
        images = to_float(batch["image"])
        stats = dict(model.init(key_encoder, images, train=True, method="encode"))
        h_BD = model.apply(stats, images, train=False, method="encode")
        params = {"encoder": stats.pop("params"), "head": head.init(key_head, h_BD)["params"]}
        return params, {"stats": {"encoder": stats}}

    def loss(params, aux, batch, key):
        images = to_float(batch["image"])
        turned = interleave([jnp.rot90(images, turns, axes=(1, 2)) for turns in range(4)])
        h_ND, stats = encode_images(model, params["encoder"], aux["stats"]["encoder"], turned, train=True, key=key)
        logits = head.apply({"params": params["head"]}, h_ND)
        value = cross_entropy(logits, jnp.tile(jnp.arange(4), len(images))).mean()
        tokens = jnp.int32(len(images) * grid_patches(model, info))
        return value, ({"stats": {"encoder": stats}}, {"loss": value, "tokens": tokens})

    def encode(params, aux, batch):
        stats = aux["stats"]["encoder"]
        return encode_images(model, params["encoder"], stats, to_float(batch["image"]), train=False)[0]

    return Objective(init, loss, encode)
