"""BYOL: predict what a moving average of the network makes of another view (Grill et al. 2020).

B batch, D projection.
"""

from typing import Any

import jax

from sslx.config import Count, Share
from sslx.data import Info
from sslx.models import Backbone
from sslx.models.heads import Projector
from sslx.objectives import Objective
from sslx.objectives.crops import pair
from sslx.objectives.joint import Tower, mean_cosine, objective
from sslx.objectives.teacher import Teacher
from sslx.views import separate


def prediction_error(p_BD, z_BD):
    """Mean over rows of |p / |p| - z / |z||^2 = 2 - 2 cos(p, z); the target z gets no gradient."""
    return 2 - 2 * mean_cosine(p_BD, jax.lax.stop_gradient(z_BD))


def make(model: Backbone, info: Info, *, steps: Count, view: dict[str, Any], second: dict[str, Any] | None = None,
         momentum: tuple[Share, Share] = (0.996, 1.0), hidden: Count = 4096, features: Count = 256) -> Objective:
    """BYOL: each view's prediction against the target's projection of the other.

    steps:    over which the target's momentum moves along a cosine.
    view:     arguments of `views.image.augmentation`. second: what is otherwise in the second view.
    hidden, features: of projector and predictor.
    """
    projector = Projector(hidden, features, 2, model.dtype, normed=False)  # what it may add, the predictor norms away
    predictor = Projector(hidden, features, 2, model.dtype, normed=False, bias=True)
    online = Tower(model, {"projector": projector, "predictor": predictor})
    target = Teacher(Tower(model, {"projector": projector}), steps, momentum)

    def begin(params, stats, drawn):
        return {"stats": stats, "teacher": target.begin(params, stats)}

    def loss(params, aux, drawn):
        aimed, teacher = target(aux["teacher"], params, drawn.large)
        made, stats = online(params, aux["stats"], drawn.large, drawn.key)
        (p_1, p_2), (z_1, z_2) = separate(made["predictor"], 2), separate(aimed["projector"], 2)
        return prediction_error(p_1, z_2) + prediction_error(p_2, z_1), {"stats": stats, "teacher": teacher}

    return objective(online, info, pair(view, second), loss, begin)
