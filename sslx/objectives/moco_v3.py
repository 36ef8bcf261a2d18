"""MoCo v3: predict a moving average's projection of the other view, against all others of the batch (Chen 2021)."""

from typing import Any

from sslx.config import Count, Positive, Share
from sslx.data import Info
from sslx.models import Backbone
from sslx.models.heads import Projector, unit
from sslx.objectives import Objective
from sslx.objectives.contrast import info_nce
from sslx.objectives.crops import pair
from sslx.objectives.joint import Tower, objective
from sslx.objectives.teacher import Teacher
from sslx.views import separate


def make(model: Backbone, info: Info, *, steps: Count, view: dict[str, Any], second: dict[str, Any] | None = None,
         temperature: Positive = 0.2, momentum: tuple[Share, Share] = (0.99, 1.0), hidden: Count = 4096,
         features: Count = 256, chunks: Count = 1) -> Objective:
    """MoCo v3: 2 t times the symmetric `info_nce` of predictions and keys.

    steps:  over which the teacher's momentum moves along a cosine.
    view:   arguments of `views.image.augmentation`. second: what is otherwise in the second view.
    hidden, features: of the projector, three layers, and the predictor, two.
    chunks: in which the products of all pairs are made, and made again for the gradient.
    """
    projector = Projector(hidden, features, 3, model.dtype)
    online = Tower(model, {"projector": projector, "predictor": Projector(hidden, features, 2, model.dtype)})
    momentum_encoder = Teacher(Tower(model, {"projector": projector}), steps, momentum)

    def begin(params, stats, drawn):
        return {"stats": stats, "teacher": momentum_encoder.begin(params, stats)}

    def loss(params, aux, drawn):
        of_teacher, teacher = momentum_encoder(aux["teacher"], params, drawn.large)
        made, stats = online(params, aux["stats"], drawn.large, drawn.key)
        (q_1, q_2), (k_1, k_2) = (separate(unit(x), 2) for x in (made["predictor"], of_teacher["projector"]))
        value = info_nce(q_1, k_2, temperature, chunks) + info_nce(q_2, k_1, temperature, chunks)
        return 2 * temperature * value, {"stats": stats, "teacher": teacher}

    return objective(online, info, pair(view, second), loss, begin)
