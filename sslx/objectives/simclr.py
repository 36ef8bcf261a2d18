"""SimCLR: agree between two views of an image, against all other images of the global batch (Chen et al. 2020).

B batch, V both views, D projection.
"""

from typing import Any

import chex
import jax

from sslx.config import Count, Positive
from sslx.data import Info
from sslx.models import Backbone
from sslx.models.heads import Projector, unit
from sslx.objectives import Objective
from sslx.objectives.contrast import among_views
from sslx.objectives.crops import pair
from sslx.objectives.joint import Tower, objective
from sslx.views import separate


def nt_xent(a_BD, b_BD, temperature: float, chunks: int = 1):
    """Normalized temperature-scaled cross-entropy of pairs (a_i, b_i), unit vectors; a number.

    l(a_i) = -log exp(a_i.b_i / t) / (sum_{j != i} exp(a_i.a_j / t) + sum_j exp(a_i.b_j / t)),
    averaged over all 2 B vectors.
    """
    chex.assert_equal_shape([a_BD, b_BD])
    _, log_sum_BV = among_views(a_BD, b_BD, temperature, chunks)
    return log_sum_BV.mean() - (a_BD * b_BD).sum(1).mean() / temperature


def make(model: Backbone, info: Info, *, view: dict[str, Any], second: dict[str, Any] | None = None,
         temperature: Positive = 0.1, chunks: Count = 1, hidden: Count = 2048, features: Count = 128,
         depth: Count = 2) -> Objective:
    """SimCLR with a projector of `depth` layers.

    view:   arguments of `views.image.augmentation`. second: what is otherwise in the second view.
    chunks: in which the products of all pairs are made, and made again for the gradient: for batches of thousands.
    """
    tower = Tower(model, {"projector": Projector(hidden, features, depth, model.dtype)})

    def loss(params, aux, drawn):
        made, stats = tower(params, aux["stats"], drawn.large, drawn.key)
        with jax.named_scope("loss"):
            return nt_xent(*separate(unit(made["projector"]), 2), temperature, chunks), {"stats": stats}

    return objective(tower, info, pair(view, second), loss)
