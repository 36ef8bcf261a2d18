"""Projectors and prototype heads that stand on a backbone's features.

B batch, D features, K prototypes.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from sslx.layers import BatchNorm, Linear, matrix
from sslx.sharding import gather


class Projector(nn.Module):
    """An MLP with global batch norm and ReLU between its layers.

    normed:     the output is normed but not scaled. bias: of the last layer.
    batch_norm: without it there is none, and each layer has a bias.
    """

    hidden: int
    features: int
    depth: int = 2
    dtype: Any = jnp.float32
    normed: bool = True
    bias: bool = False
    batch_norm: bool = True
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, x_BD, *, train: bool):
        for i in range(self.depth):
            last = i == self.depth - 1
            bias = (last and self.bias) or not self.batch_norm
            x_BD = Linear(self.features if last else self.hidden, ("embed", None), bias=bias, dtype=self.dtype)(x_BD)
            if self.batch_norm and (self.normed or not last):
                x_BD = BatchNorm(affine=not last)(x_BD, train=train)
            x_BD = x_BD if last else self.activation(x_BD)
        return x_BD


def dino_mlp(hidden: int, features: int, dtype: Any, batch_norm: bool) -> Projector:
    """What DINO has before its prototypes: three layers with GELU, with or without batch norm between them."""
    return Projector(hidden, features, 3, dtype, normed=False, batch_norm=batch_norm, activation=nn.gelu)


class Prototypes(nn.Module):
    """Cosines of a feature with K prototypes, [B, K], K sharded over `tensor`: a last layer with weight norm."""

    n_prototypes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BD, *, train: bool = True):
        """Logits ([B, K]; `train` matters to heads with batch statistics)."""
        del train
        w_DK = matrix(self, "prototypes", (x_BD.shape[-1], self.n_prototypes), ("embed", "vocab"))
        w_DK = unit(gather(w_DK), axis=0).astype(self.dtype)
        return jnp.einsum("...d,dk->...k", unit(x_BD).astype(self.dtype), w_DK).astype(jnp.float32)


def unit(x, axis: int = -1):
    """x / |x| along an axis, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.square(x).sum(axis, keepdims=True) + 1e-12)
