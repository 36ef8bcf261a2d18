"""CLIP: tell an image's caption among all captions of the batch, and the image by its caption (Radford et al. 2021)."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from sslx.config import Count, Positive
from sslx.data import Info
from sslx.models.two_towers import TwoTowers
from sslx.objectives import Objective
from sslx.objectives.contrast import info_nce
from sslx.objectives.pairs import objective

LARGEST = 100.0  # of 1 / t


def symmetric_info_nce(image_BD, text_BD, temperature, chunks: int = 1):
    """Half the sum of `info_nce` of images among texts and of texts among images, of unit vectors."""
    return (info_nce(image_BD, text_BD, temperature, chunks) + info_nce(text_BD, image_BD, temperature, chunks)) / 2


@jax.custom_vjp
def inverse_temperature(log_scale):
    """min(exp(s), LARGEST). A greater s keeps the gradients by which it falls, else it would never come back."""
    return jnp.minimum(jnp.exp(log_scale), LARGEST)


def inverse_temperature_backward(log_scale, d):
    d = d * inverse_temperature(log_scale)
    return (jnp.where(log_scale < math.log(LARGEST), d, jnp.maximum(d, 0)),)


inverse_temperature.defvjp(lambda s: (inverse_temperature(s), s), inverse_temperature_backward)


def make(model: TwoTowers, info: Info, *, features: Count = 512, temperature: Positive = 0.07, chunks: Count = 1,
         view: dict[str, Any] | None = None, locked: bool = False) -> Objective:
    """CLIP.

    features:    in which images and texts meet.
    temperature: at birth; it is learnt, and its inverse is at most 100.
    chunks:      in which the products of all pairs are made, and made again for the gradient: for batches of thousands.
    view:        arguments of `views.image.augmentation`; None for images as they are.
    locked:      the image tower is that of config.run.encoder_from, and only its head is trained (LiT).
    """
    def loss(scale, image_BD, text_BD):
        return symmetric_info_nce(image_BD, text_BD, 1 / inverse_temperature(scale["log_scale"]), chunks)

    return objective(model, info, features, view, locked, {"log_scale": -math.log(temperature)}, loss)
