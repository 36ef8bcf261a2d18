"""Projectors and prototype heads that stand on a backbone's features.

B batch, D features, K prototypes.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from sslx.layers import BatchNorm, Linear, matrix
from sslx.sharding import gather


class Projector(nn.Module):
    """An MLP with global batch norm and ReLU between its layers.

    normed: the output is normed but not scaled. bias: of the last layer.
    """

    hidden: int
    features: int
    depth: int = 2
    dtype: Any = jnp.float32
    normed: bool = True
    bias: bool = False

    @nn.compact
    def __call__(self, x_BD, *, train: bool):
        for i in range(self.depth):
            last = i == self.depth - 1
            x_BD = Linear(self.features if last else self.hidden, ("embed", None), bias=last and self.bias,
                          dtype=self.dtype)(x_BD)
            if self.normed or not last:
                x_BD = BatchNorm(affine=not last)(x_BD, train=train)
            x_BD = x_BD if last else nn.relu(x_BD)
        return x_BD


class Prototypes(nn.Module):
    """Cosines of a projected feature with K prototypes, [B, K], K sharded over `tensor` (Caron et al. 2021).

    A three-layer MLP with GELU to `bottleneck` dimensions, brought to unit length, times columns of unit length.
    """

    hidden: int
    bottleneck: int
    n_prototypes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BD, *, train: bool = True):
        """Logits ([B, K]; `train` matters to heads with batch statistics)."""
        del train
        for i in range(2):
            x_BD = nn.gelu(Linear(self.hidden, ("embed", None), dtype=self.dtype, name=f"mlp_{i}")(x_BD))
        x_BD = unit(Linear(self.bottleneck, ("embed", None), dtype=self.dtype, name="mlp_2")(x_BD))
        shape = (self.bottleneck, self.n_prototypes)
        w_DK = unit(gather(matrix(self, "prototypes", shape, ("embed", "vocab"))), axis=0)
        return jnp.einsum("bd,dk->bk", x_BD.astype(self.dtype), w_DK.astype(self.dtype)).astype(jnp.float32)


def unit(x, axis: int = -1):
    """x / |x| along an axis, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.square(x).sum(axis, keepdims=True) + 1e-12)
