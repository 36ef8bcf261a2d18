"""What objectives on pairs of images and captions share: two towers, each with a linear head to common features.

B batch, D features.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sslx import config
from sslx.data import Info
from sslx.layers import Linear
from sslx.models import encode as encode_images
from sslx.models.heads import unit
from sslx.models.two_towers import TwoTowers
from sslx.objectives import Objective
from sslx.objectives.image import check_images, grid_patches
from sslx.objectives.text import check_tokens, masking, mean_pooled
from sslx.views.image import augmentation, to_float


def objective(model: TwoTowers, info: Info, features: int, view: dict[str, Any] | None, locked: bool,
              scale: dict[str, float], loss: Callable) -> Objective:
    """The objective of two towers.

    view:  arguments of `views.image.augmentation`; None for images as they are.
    locked: the image tower is one that another run has trained, and is not trained further (LiT, Zhai et al. 2022):
           aux carries it. Its head is trained.
    scale: trained numbers that `loss` takes, at birth.
    loss:  (scale, images float32 [B, D], texts [B, D], both unit vectors) -> loss.
    """
    check_images(model.image, info)
    check_tokens(model.text, info)
    heads = {name: Linear(features, ("embed", None), bias=False) for name in ("image_head", "text_head")}
    look = ((lambda key, images: to_float(images)) if view is None else
            config.call(augmentation, view, "config.objective.view"))
    patches = grid_patches(model.image, info)

    def read(params, batch):
        return mean_pooled(model.text.apply({"params": params["text"]}, batch["tokens"], "bidirectional",
                                            **masking(batch), method="hidden"), batch)

    def projected(params, name, x_BD):
        return unit(heads[name].apply({"params": params[name]}, x_BD.astype(jnp.float32)))

    def init(key, batch):
        keys = jax.random.split(key, 5)
        images = look(keys[4], batch["image"])
        stats = dict(model.image.init(keys[0], images, train=True, method="encode"))
        encoder = {"encoder": stats.pop("params")}
        params, aux = ({}, {"locked": encoder}) if locked else (dict(encoder), {})
        params["text"] = model.text.init(keys[1], batch["tokens"], "bidirectional", method="hidden",
                                         **masking(batch))["params"]
        image_BD, _ = encode_images(model.image, encoder["encoder"], stats, images, train=False)
        for k, name, x_BD in ((keys[2], "image_head", image_BD), (keys[3], "text_head", read(params, batch))):
            params[name] = heads[name].init(k, x_BD.astype(jnp.float32))["params"]
        params["scale"] = {name: jnp.float32(x) for name, x in scale.items()}
        return params, aux | {"stats": {"encoder": stats}}

    def seen(params, aux, images, train, key=None):
        """(features, aux) of images."""
        encoder, train = (aux["locked"], False) if locked else (params, train)
        image_BD, stats = encode_images(model.image, encoder["encoder"], aux["stats"]["encoder"], images, train=train,
                                        key=key)
        return image_BD, aux | {"stats": {"encoder": stats}}

    def measured(params, aux, batch, key):
        key_view, key_drop = jax.random.split(key)
        with jax.named_scope("image"):
            image_BD, aux = seen(params, aux, look(key_view, batch["image"]), True, key_drop)
        with jax.named_scope("text"):
            text_BD = read(params, batch)
        with jax.named_scope("loss"):
            value = loss(params["scale"], projected(params, "image_head", image_BD),
                         projected(params, "text_head", text_BD))
        return value, (aux, {"loss": value, "tokens": jnp.int32(len(batch["image"]) * patches)})

    def encode(params, aux, batch):
        return seen(params, aux, to_float(batch["image"]), False)[0].astype(jnp.float32)

    def embed(params, aux, batch):
        return {"image": projected(params, "image_head", encode(params, aux, batch)),
                "text": projected(params, "text_head", read(params, batch))}

    def show(params, aux, batch, key):
        return {"image": look(key, batch["image"]), "caption": batch["tokens"]}

    return Objective(init, measured, encode, show, embed=embed, of_batch=True)
