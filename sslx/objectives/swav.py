"""SwAV: predict the assignment of a crop to prototypes from another crop of the image (Caron et al. 2020).

B batch, K prototypes; S slots of a queue.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sslx.config import Count, Natural, Positive, Steps
from sslx.data import Info
from sslx.models import Backbone
from sslx.models.heads import Projector, Prototypes, unit
from sslx.objectives import Objective
from sslx.objectives.assignment import sinkhorn, swapped_prediction
from sslx.objectives.contrast import Queue
from sslx.objectives.crops import multi
from sslx.objectives.joint import Tower, embedded, objective


def make(model: Backbone, info: Info, *, global_view: dict[str, Any], local_view: dict[str, Any],
         second: dict[str, Any] | None = None, n_local: Natural = 6, n_prototypes: Count = 3000, hidden: Count = 2048,
         features: Count = 128, temperature: Positive = 0.1, assignment_temperature: Positive = 0.05,
         iterations: Count = 3, queue: Natural = 0, queue_from: Steps = 0) -> Objective:
    """SwAV with two global crops, which are assigned, and `n_local` local ones.

    global_view, local_view: arguments of `views.image.augmentation`. second: what is otherwise in the second global
                       view.
    assignment_temperature, iterations: of Sinkhorn's algorithm, over the global batch.
    queue:             features of earlier batches that are assigned along, a multiple of data.batch_size; from step
                       `queue_from` on.
    """
    crops = multi(global_view, second, local_view, n_local)
    prototypes = Prototypes(n_prototypes, model.dtype)
    tower = Tower(model, {"projector": Projector(hidden, features, 2, model.dtype, normed=False, bias=True),
                          "prototypes": prototypes})
    memory = Queue(queue, features)

    def begin(params, stats, drawn):
        rows, keys = len(drawn.batch["image"]), jax.random.split(drawn.key)
        return {"stats": stats, "step": jnp.int32(0), "queues": [memory.begin(key, rows) for key in keys if queue]}

    def assigned(scores_BK, params, queue, step):
        """Assignments of a crop's scores, along with those of its queue."""
        old_SBK = prototypes.apply({"params": params["prototypes"]}, memory.slots(queue, len(scores_BK)))
        scores_SBK = jnp.concatenate([scores_BK[None], old_SBK])
        age_S = jnp.arange(len(scores_SBK))  # the first is of now; slots fill in turn, and are random before
        counted = (age_S == 0) | ((step >= queue_from) & (age_S <= step))
        return sinkhorn(scores_SBK, assignment_temperature, iterations, counted[:, None, None])[0]

    def loss(params, aux, drawn):
        step, queues = aux["step"], aux["queues"]
        made, stats = embedded(tower, params, aux["stats"], crops, drawn)
        scores_VBK, z_VBD = made["prototypes"], made["projector"]
        with jax.named_scope("loss"):
            targets = ([assigned(x, params, q, step) for x, q in zip(scores_VBK[:2], queues, strict=True)] if queue else
                       [sinkhorn(x, assignment_temperature, iterations) for x in scores_VBK[:2]])
            value = swapped_prediction([x / temperature for x in scores_VBK], targets)
        queues = [memory.push(q, unit(z)) for q, z in zip(queues, z_VBD, strict=False)]
        return value, {"stats": stats, "step": step + 1, "queues": queues}

    return objective(tower, info, crops, loss, begin)
