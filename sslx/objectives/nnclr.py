"""NNCLR: the nearest neighbour of one view in a queue is predicted from the other (Dwibedi et al. 2021)."""

from typing import Any

from sslx.config import Count, Positive
from sslx.data import Info
from sslx.models import Backbone
from sslx.models.heads import Projector, unit
from sslx.objectives import Objective
from sslx.objectives.contrast import Queue, info_nce
from sslx.objectives.crops import pair
from sslx.objectives.joint import Tower, objective
from sslx.objectives.simclr import nt_xent
from sslx.views import separate


def make(model: Backbone, info: Info, *, view: dict[str, Any], second: dict[str, Any] | None = None,
         queue: Count = 98304, temperature: Positive = 0.1, hidden: Count = 2048, features: Count = 256,
         predictor: Count = 4096, within: bool = False) -> Objective:
    """NNCLR: the symmetric `info_nce` of nearest neighbours and predictions.

    view:      arguments of `views.image.augmentation`. second: what is otherwise in the second view.
    queue:     projections of earlier batches, a multiple of data.batch_size.
    hidden, features: of the projector, three layers. predictor: hidden units of the predictor.
    within:    rows of the same view are negatives too, as in SimCLR: `nt_xent`.
    """
    tower = Tower(model, {"projector": Projector(hidden, features, 3, model.dtype),
                          "predictor": Projector(predictor, features, 2, model.dtype, normed=False, bias=True)})
    support, contrast = Queue(queue, features), nt_xent if within else info_nce

    def begin(params, stats, drawn):
        return {"stats": stats, "queue": support.begin(drawn.key, len(drawn.batch["image"]))}

    def loss(params, aux, drawn):
        made, stats = tower(params, aux["stats"], drawn.large, drawn.key)
        (z_1, z_2), (p_1, p_2) = (separate(unit(made[name]), 2) for name in ("projector", "predictor"))
        near_1, near_2 = (support.nearest(aux["queue"], z_BD) for z_BD in (z_1, z_2))
        value = (contrast(near_1, p_2, temperature) + contrast(near_2, p_1, temperature)) / 2
        return value, {"stats": stats, "queue": support.push(aux["queue"], z_1)}

    return objective(tower, info, pair(view, second), loss, begin)
