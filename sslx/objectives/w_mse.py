"""W-MSE: whitened features of two views of an image agree (Ermolov et al. 2021).

B batch, G groups, D features.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sslx.config import Count, Share, UserError
from sslx.data import Info
from sslx.models import Backbone
from sslx.models.heads import Projector
from sslx.objectives import Objective
from sslx.objectives.crops import pair
from sslx.objectives.joint import Tower, mean_cosine, objective
from sslx.sharding import axis_size, spec
from sslx.views import separate


def whitened(x_BD, groups: int = 1, shrinkage: float = 0.0):
    """L^-1 (x - mean), L L^T the covariance of a group, the rows i mod `groups`: its features are uncorrelated.

    shrinkage: the share of the identity in the covariance.
    Raises UserError unless the groups are of one size, of more rows than features, and on all devices of a batch.
    """
    B, D = x_BD.shape
    if B % groups or B // groups <= D:
        raise UserError(f"config.objective.groups={groups} of a batch of {B}: each must have more rows than"
                        f" config.objective.features={D} for a covariance that can be inverted")
    if B // groups % (devices := axis_size("batch")):
        raise UserError(f"config.objective.groups={groups} of a batch of {B} do not divide over the {devices} devices"
                        " that share it (mesh.data x mesh.fsdp): choose fewer groups, or a larger batch")
    x_BGD = jnp.reshape(x_BD.astype(jnp.float32), (B // groups, groups, D), out_sharding=spec("batch"))
    x_BGD = x_BGD - x_BGD.mean(0)
    whole = jax.sharding.PartitionSpec()
    c_GDD = jnp.einsum("bgd,bge->gde", x_BGD, x_BGD, precision="highest", out_sharding=whole) / (B // groups - 1)
    l_GDD = jnp.linalg.cholesky((1 - shrinkage) * c_GDD + shrinkage * jnp.eye(D))
    inverse_GDD = jax.scipy.linalg.solve_triangular(l_GDD, jnp.broadcast_to(jnp.eye(D), l_GDD.shape), lower=True)
    return jnp.einsum("bgd,ged->bge", x_BGD, inverse_GDD, precision="highest").reshape(B, D)


def make(model: Backbone, info: Info, *, view: dict[str, Any], second: dict[str, Any] | None = None,
         groups: Count = 1, shrinkage: Share = 0.0, hidden: Count = 1024, features: Count = 64) -> Objective:
    """W-MSE: 2 - 2 cos of the whitened features of both views.

    view:      arguments of `views.image.augmentation`. second: what is otherwise in the second view.
    groups:    parts of the batch that are whitened by themselves.
    shrinkage: share of the identity in what is inverted, for batches of hardly more rows than features. The loss falls
               where the covariance is less than it: in long runs features then lose their rank, however small it is.
    """
    # Whitening undoes the last norm, but for the identity: features that are small would be left as they are.
    tower = Tower(model, {"projector": Projector(hidden, features, 2, model.dtype)})

    def loss(params, aux, drawn):
        made, stats = tower(params, aux["stats"], drawn.large, drawn.key)
        a, b = (whitened(x, groups, shrinkage) for x in separate(made["projector"], 2))
        return 2 - 2 * mean_cosine(a, b), {"stats": stats}

    return objective(tower, info, pair(view, second), loss)
