"""SimSiam: predict what the network itself makes of another view, through which no gradient goes (Chen and He 2021)."""

from typing import Any

import jax

from sslx.config import Count
from sslx.data import Info
from sslx.models import Backbone
from sslx.models.heads import Projector
from sslx.objectives import Objective
from sslx.objectives.crops import pair
from sslx.objectives.joint import Tower, mean_cosine, objective
from sslx.views import separate


def negative_cosine(p_BD, z_BD):
    """Mean over rows of -cos(p, z) of a prediction and its target z, which gets no gradient."""
    return -mean_cosine(p_BD, jax.lax.stop_gradient(z_BD))


def make(model: Backbone, info: Info, *, view: dict[str, Any], second: dict[str, Any] | None = None,
         features: Count = 2048, bottleneck: Count = 512) -> Objective:
    """SimSiam: a projector of three layers of `features`, a predictor through `bottleneck`.

    view: arguments of `views.image.augmentation`. second: what is otherwise in the second view.
    """
    tower = Tower(model, {"projector": Projector(features, features, 3, model.dtype),
                          "predictor": Projector(bottleneck, features, 2, model.dtype, normed=False, bias=True)})

    def loss(params, aux, drawn):
        made, stats = tower(params, aux["stats"], drawn.large, drawn.key)
        (z_1, z_2), (p_1, p_2) = (separate(made[name], 2) for name in ("projector", "predictor"))
        return (negative_cosine(p_1, z_2) + negative_cosine(p_2, z_1)) / 2, {"stats": stats}

    return objective(tower, info, pair(view, second), loss)
