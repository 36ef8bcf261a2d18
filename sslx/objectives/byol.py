"""BYOL: predict what a moving average of the network makes of another view (Grill et al. 2020).

B batch, D projection.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sslx.config import Count, Share
from sslx.data import Info
from sslx.models import Backbone
from sslx.models.heads import Projector
from sslx.objectives import Objective
from sslx.objectives.joint import Tower, cosine, moving_average, negative_cosine, objective, pair
from sslx.views import separate


def prediction_error(p_BD, z_BD):
    """Mean over rows of |p / |p| - z / |z||^2 = 2 - 2 cos(p, z); the target z gets no gradient."""
    return 2 + 2 * negative_cosine(p_BD, z_BD)


def make(model: Backbone, info: Info, *, steps: Count, view: dict[str, Any], second: dict[str, Any] | None = None,
         momentum: tuple[Share, Share] = (0.996, 1.0), hidden: Count = 4096, features: Count = 256) -> Objective:
    """BYOL: each view's prediction against the target's projection of the other.

    steps:    over which the target's momentum moves along a cosine.
    view:     arguments of `views.image.augmentation`. second: what is otherwise in the second view.
    hidden, features: of projector and predictor.
    """
    projector = Projector(hidden, features, 2, model.dtype, normed=False)  # what it may add, the predictor norms away
    predictor = Projector(hidden, features, 2, model.dtype, normed=False, bias=True)
    target = Tower(model, {"projector": projector})
    online = Tower(model, {"projector": projector, "predictor": predictor})

    def begin(params, stats):
        return {"stats": stats, "target": jax.tree.map(jnp.copy, target.of(params)), "target_stats": target.of(stats),
                "step": jnp.int32(0)}

    def loss(params, aux, crops):
        # The target follows the parameters that the last step left, so that it is part of this step.
        followed = moving_average(aux["target"], target.of(params), cosine(aux["step"], steps, *momentum))
        with jax.named_scope("target"):
            aimed, target_stats = target(followed, aux["target_stats"], crops[0])
        with jax.named_scope("online"):
            made, stats = online(params, aux["stats"], crops[0])
        (p_1, p_2), (z_1, z_2) = separate(made["predictor"], 2), separate(aimed["projector"], 2)
        aux = {"stats": stats, "target": followed, "target_stats": target_stats, "step": aux["step"] + 1}
        return prediction_error(p_1, z_2) + prediction_error(p_2, z_1), aux

    return objective(online, info, pair(view, second), loss, begin)
