"""SigLIP: for each pair of an image and a caption of the batch, tell whether they belong together (Zhai et al. 2023).

B batch, D features, C parts of M captions.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from sslx.config import Count, Positive
from sslx.data import Info
from sslx.models.two_towers import TwoTowers
from sslx.objectives import Objective
from sslx.objectives.contrast import in_parts
from sslx.objectives.pairs import objective
from sslx.sharding import spec


def sigmoid_contrast(image_BD, text_BD, scale, bias, chunks: int = 1):
    """-1 / B sum_ij log sigmoid(z_ij (s x_i.y_j + b)), z_ij = 1 if i = j, else -1.

    A device holds the products of its images with one of `chunks` parts of the captions at a time. Raises UserError if
    `chunks` does not divide B.
    """
    own_B = jax.sharding.reshard(jnp.arange(len(text_BD)), spec("batch"))

    def summed(id_M, text_MD):
        logits_BM = scale * jnp.einsum("bd,md->bm", image_BD, text_MD) + bias
        return jax.nn.softplus((1 - 2 * (own_B[:, None] == id_M)) * logits_BM).sum(1)

    return in_parts(summed, text_BD, chunks).sum(0).mean()


def make(model: TwoTowers, info: Info, *, features: Count = 512, scale: Positive = 10.0, bias: float = -10.0,
         chunks: Count = 1, view: dict[str, Any] | None = None, locked: bool = False) -> Objective:
    """SigLIP.

    features:    in which images and texts meet.
    scale, bias: of their products, at birth; both are learnt.
    chunks:      in which the products of all pairs are made, and made again for the gradient: for batches of thousands.
    view:        arguments of `views.image.augmentation`; None for images as they are.
    locked:      the image tower is that of config.run.encoder_from, and only its head is trained (LiT).
    """
    def loss(trained, image_BD, text_BD):
        return sigmoid_contrast(image_BD, text_BD, jnp.exp(trained["log_scale"]), trained["bias"], chunks)

    return objective(model, info, features, view, locked, {"log_scale": math.log(scale), "bias": bias}, loss)
