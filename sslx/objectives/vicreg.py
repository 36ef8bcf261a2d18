"""VICReg: two views alike, each feature with a variance of its own, no two features alike (Bardes et al. 2022).

B batch, D features.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from sslx.config import Count, Nonnegative
from sslx.data import Info
from sslx.models import Backbone
from sslx.models.heads import Projector
from sslx.objectives import Objective
from sslx.objectives.crops import pair
from sslx.objectives.joint import Tower, objective, off_diagonal_squares, products
from sslx.views import separate


def invariance(a_BD, b_BD):
    """mean (a - b)^2"""
    chex.assert_equal_shape([a_BD, b_BD])
    return jnp.square(a_BD - b_BD).mean()


def variance(x_BD):
    """mean_d max(0, 1 - sqrt(Var x_d + 1e-4)), the variance over the global batch; of [B, M, D] the mean over m."""
    return jax.nn.relu(1 - jnp.sqrt(x_BD.var(0, ddof=1) + 1e-4)).mean()


def covariance(x_BD):
    """sum_{i != j} Cov(x_i, x_j)^2 / D over the global batch; of [B, M, D] the mean over m."""
    B, x_BD = len(x_BD), x_BD - x_BD.mean(0)
    return off_diagonal_squares(products(x_BD, x_BD) / (B - 1)) * B / x_BD.size


def regularized(a, b, weights):
    """w_i invariance + w_v mean variance + w_c mean covariance, the means of both sides."""
    alike, varied, apart = weights
    return (alike * invariance(a, b) + varied * (variance(a) + variance(b)) / 2
            + apart * (covariance(a) + covariance(b)) / 2)


def make(model: Backbone, info: Info, *, view: dict[str, Any], second: dict[str, Any] | None = None,
         weights: tuple[Nonnegative, Nonnegative, Nonnegative] = (25.0, 25.0, 1.0),
         features: Count = 8192) -> Objective:
    """VICReg with an expander of three layers of `features`.

    view:    arguments of `views.image.augmentation`. second: what is otherwise in the second view.
    weights: of invariance, variance (the mean of both views') and covariance (the sum of both views').
    """
    tower = Tower(model, {"expander": Projector(features, features, 3, model.dtype, normed=False)})
    alike, varied, apart = weights

    def loss(params, aux, drawn):
        made, stats = tower(params, aux["stats"], drawn.large, drawn.key)
        a, b = (x.astype(jnp.float32) for x in separate(made["expander"], 2))
        return regularized(a, b, (alike, varied, 2 * apart)), {"stats": stats}

    return objective(tower, info, pair(view, second), loss)
