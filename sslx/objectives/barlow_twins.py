"""Barlow Twins: features of two views correlate each with itself and with no other (Zbontar et al. 2021).

B batch, D features.
"""

from typing import Any

import chex
import jax.numpy as jnp

from sslx.config import Count, Nonnegative
from sslx.data import Info
from sslx.models import Backbone
from sslx.models.heads import Projector
from sslx.objectives import Objective
from sslx.objectives.crops import pair
from sslx.objectives.joint import Tower, objective, off_diagonal_squares, products
from sslx.views import separate


def redundancy_reduction(a_BD, b_BD, off_diagonal: float):
    """sum_i (1 - C_ii)^2 + l sum_{i != j} C_ij^2, C [D, D] the correlations of the features over the global batch."""
    chex.assert_equal_shape([a_BD, b_BD])
    a_BD, b_BD = standardized(a_BD), standardized(b_BD)
    c_DD = products(a_BD, b_BD) / len(a_BD)
    return jnp.square(1 - jnp.diagonal(c_DD)).sum() + off_diagonal * off_diagonal_squares(c_DD)


def standardized(x_BD):
    """Mean 0 and variance 1 of each feature over the batch, as batch norm has it."""
    x_BD = x_BD.astype(jnp.float32)
    return (x_BD - x_BD.mean(0)) / jnp.sqrt(x_BD.var(0) + 1e-5)


def make(model: Backbone, info: Info, *, view: dict[str, Any], second: dict[str, Any] | None = None,
         off_diagonal: Nonnegative = 5e-3, features: Count = 8192) -> Objective:
    """Barlow Twins with a projector of three layers of `features`.

    view:         arguments of `views.image.augmentation`. second: what is otherwise in the second view.
    off_diagonal: weight of the correlations between different features.
    """
    tower = Tower(model, {"projector": Projector(features, features, 3, model.dtype, normed=False)})

    def loss(params, aux, drawn):
        made, stats = tower(params, aux["stats"], drawn.large, drawn.key)
        return redundancy_reduction(*separate(made["projector"], 2), off_diagonal), {"stats": stats}

    return objective(tower, info, pair(view, second), loss)
