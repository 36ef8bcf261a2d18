"""SupCon: supervised contrast, the labelled reference for the others (Khosla et al. 2020).

B batch, V both views, D projection, Y classes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sslx.config import Count, Positive, UserError
from sslx.data import Info
from sslx.models import Backbone
from sslx.models.heads import Projector, unit
from sslx.objectives import Objective
from sslx.objectives.contrast import among_views
from sslx.objectives.crops import pair
from sslx.objectives.joint import Tower, objective, products
from sslx.views import separate


def supervised_contrast(a_BD, b_BD, label_B, n_classes: int, temperature: float, chunks: int = 1):
    """Mean over i of -1 / |P_i| sum_{p in P_i} log exp(z_i.z_p / t) / sum_{j != i} exp(z_i.z_j / t).

    z are the unit vectors of both views, P_i all others of the same label: their sum is that of the class without z_i.
    """
    z_BVD, log_sum_BV = among_views(a_BD, b_BD, temperature, chunks)
    of_class_BY = jax.nn.one_hot(label_B, n_classes)
    sum_YD = products(of_class_BY, z_BVD.sum(1))
    others_B = (of_class_BY * (2 * of_class_BY.sum(0) - 1)).sum(1)
    of_class_BD = jnp.einsum("by,yd->bd", of_class_BY, sum_YD)
    positive_BV = ((of_class_BD[:, None] - z_BVD) * z_BVD).sum(-1) / others_B[:, None]
    return (log_sum_BV - positive_BV / temperature).mean()


def make(model: Backbone, info: Info, *, view: dict[str, Any], second: dict[str, Any] | None = None,
         temperature: Positive = 0.1, chunks: Count = 1, hidden: Count = 2048, features: Count = 128,
         depth: Count = 2) -> Objective:
    """SupCon with a projector of `depth` layers. Raises UserError for a source without labels.

    view:   arguments of `views.image.augmentation`. second: what is otherwise in the second view.
    chunks: in which the products of all pairs are made, and made again for the gradient: for batches of thousands.
    """
    if info.num_classes is None:
        raise UserError(f"config.objective.name='sup_con' learns from labels, and {info.name!r} has none")
    tower = Tower(model, {"projector": Projector(hidden, features, depth, model.dtype)})

    def loss(params, aux, drawn):
        made, stats = tower(params, aux["stats"], drawn.large, drawn.key)
        z, label_B = separate(unit(made["projector"]), 2), drawn.batch["label"]
        with jax.named_scope("loss"):
            return supervised_contrast(*z, label_B, info.num_classes, temperature, chunks), {"stats": stats}

    return objective(tower, info, pair(view, second), loss, reads=("label",))
