"""DINO: a student matches the prototype assignments of its own moving average across crops (Caron et al. 2021).

N rows of several views, K prototypes.
"""

from typing import Any

import jax.numpy as jnp

from sslx.config import Count, Natural, Positive, Share, Steps
from sslx.data import Info
from sslx.models import Backbone
from sslx.models.heads import Prototypes, dino_mlp
from sslx.objectives import Objective
from sslx.objectives.assignment import centred, swapped_prediction
from sslx.objectives.crops import multi
from sslx.objectives.joint import Tower, embedded, objective
from sslx.objectives.teacher import Teacher, linear, moving_average
from sslx.views import separate


def self_distillation(student_VBK, teacher_GBK, centre_K, student_temperature: float, teacher_temperature):
    """`swapped_prediction` of softmax((teacher - centre) / t_t) from student / t_s, of sequences of logits."""
    targets_GBK = [centred(x_BK, centre_K, teacher_temperature) for x_BK in teacher_GBK]
    return swapped_prediction([x_BK / student_temperature for x_BK in student_VBK], targets_GBK)


def make(model: Backbone, info: Info, *, steps: Count, global_view: dict[str, Any], local_view: dict[str, Any],
         second: dict[str, Any] | None = None, n_local: Natural = 8, n_prototypes: Count = 65536, hidden: Count = 2048,
         bottleneck: Count = 256, student_temperature: Positive = 0.1,
         teacher_temperature: tuple[Positive, Positive] = (0.04, 0.04), temperature_warmup: Steps = 0,
         momentum: tuple[Share, Share] = (0.996, 1.0), centre_momentum: Share = 0.9,
         batch_norm: bool = False) -> Objective:
    """DINO with two global crops and `n_local` local ones.

    steps:               over which the teacher's momentum moves along a cosine.
    global_view, local_view: arguments of `views.image.augmentation`. second: what is otherwise in the second global
                         view; the paper blurs the first always, the second seldom, and solarizes it.
    teacher_temperature: linear from the first to the second over `temperature_warmup` steps.
    centre_momentum:     of the moving mean of the teacher's logits.
    batch_norm:          between the layers of the projector; the paper's code has it for convolutional networks. Class
                         tokens differ little at first, and without it a short run may end with uniform assignments.
    """
    crops = multi(global_view, second, local_view, n_local)
    mlp = dino_mlp(hidden, bottleneck, model.dtype, batch_norm)
    tower = Tower(model, {"projector": mlp, "prototypes": Prototypes(n_prototypes, model.dtype)})
    teacher = Teacher(tower, steps, momentum)

    def begin(params, stats, drawn):
        return {"stats": stats, "teacher": teacher.begin(params, stats), "centre": jnp.zeros(n_prototypes)}

    def loss(params, aux, drawn):
        step = aux["teacher"]["step"]
        of_teacher, carried = teacher(aux["teacher"], params, drawn.large)
        made, stats = embedded(tower, params, aux["stats"], crops, drawn)
        temperature, teacher_NK = linear(step, temperature_warmup, *teacher_temperature), of_teacher["prototypes"]
        value = self_distillation(made["prototypes"], separate(teacher_NK, 2), aux["centre"], student_temperature,
                                  temperature)
        centre = moving_average(aux["centre"], teacher_NK.mean(0), centre_momentum)
        return value, {"stats": stats, "teacher": carried, "centre": centre}

    return objective(tower, info, crops, loss, begin, teacher.judged)
