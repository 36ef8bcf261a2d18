"""MoCo: find the other view among a queue of keys, made by a moving average of the network (He et al. 2020).

B batch, D projection.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from sslx.config import Count, Positive, Share
from sslx.data import Info
from sslx.models import Backbone
from sslx.models.heads import Projector, unit
from sslx.objectives import Objective
from sslx.objectives.contrast import Queue
from sslx.objectives.crops import pair
from sslx.objectives.joint import Tower, objective
from sslx.objectives.teacher import Teacher
from sslx.views import separate


def queue_contrast(q_BD, k_BD, log_sum_B, temperature):
    """Mean of -log exp(q.k / t) / (exp(q.k / t) + sum_n exp(q.k_n / t)); `log_sum_B` is the log of the sum."""
    chex.assert_equal_shape([q_BD, k_BD])
    positive_B = (q_BD * k_BD).sum(1) / temperature
    return (jnp.logaddexp(positive_B, log_sum_B) - positive_B).mean()


def make(model: Backbone, info: Info, *, view: dict[str, Any], second: dict[str, Any] | None = None,
         queue: Count = 65536, temperature: Positive = 0.2, momentum: Share = 0.999, symmetric: bool = False,
         hidden: Count = 2048, features: Count = 128, depth: Count = 2) -> Objective:
    """MoCo v2 (Chen et al. 2020); v1 is `depth` 1, without blur, at temperature 0.07.

    Batch statistics are those of the global batch; keys are not shuffled between devices.

    view:      arguments of `views.image.augmentation`. second: what is otherwise in the second view, that of the keys.
    queue:     keys of earlier batches, a multiple of data.batch_size.
    momentum:  of the moving average.
    symmetric: each view is also the other's key, at twice the cost.
    """
    tower = Tower(model, {"projector": Projector(hidden, features, depth, model.dtype, batch_norm=False)})
    teacher, keys = Teacher(tower, 1, (momentum, momentum)), Queue(queue, features)

    def begin(params, stats, drawn):
        return {"stats": stats, "teacher": teacher.begin(params, stats),
                "queue": keys.begin(drawn.key, len(drawn.batch["image"]))}

    def loss(params, aux, drawn):
        views = separate(drawn.large, 2)
        asked, answered = (drawn.large, drawn.large) if symmetric else views
        of_teacher, carried = teacher(aux["teacher"], params, answered)
        made, stats = tower(params, aux["stats"], asked, drawn.key)
        q, k = unit(made["projector"]), unit(of_teacher["projector"])
        pairs = list(zip(separate(q, 2), separate(k, 2)[::-1], strict=True)) if symmetric else [(q, k)]
        with jax.named_scope("loss"):
            value = sum(queue_contrast(q_BD, k_BD, keys.log_sum_exp(aux["queue"], q_BD, temperature), temperature)
                        for q_BD, k_BD in pairs) / len(pairs)
        return value, {"stats": stats, "teacher": carried, "queue": keys.push(aux["queue"], pairs[0][1])}

    return objective(tower, info, pair(view, second), loss, begin)
