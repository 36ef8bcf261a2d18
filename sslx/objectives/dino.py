"""DINO: a student matches the prototype assignments of its own moving average across crops (Caron et al. 2021).

B batch, D features, K prototypes; N rows of several views.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from sslx import config
from sslx.config import Count, Natural, Positive, Share
from sslx.data import Info
from sslx.models import Backbone
from sslx.models.heads import Prototypes
from sslx.objectives import Objective
from sslx.objectives.joint import Crops, Tower, cosine, moving_average, objective
from sslx.views import separate
from sslx.views.image import augmentation


def self_distillation(student_VBK, teacher_GBK, centre_K, student_temperature: float, teacher_temperature):
    """Mean over pairs (teacher view g, student view v != g) and rows of the cross-entropy of assignments.

    -sum_k q_gk log p_vk, q = softmax((teacher - centre) / t_t), p = softmax(student / t_s). Both are sequences
    of logits [B, K]; the first views of the student are those of the teacher. q gets no gradient.
    """
    chex.assert_equal_shape([*student_VBK, *teacher_GBK])
    log_p = [jax.nn.log_softmax(s_BK / student_temperature) for s_BK in student_VBK]
    total_BK = sum(log_p)
    loss = jnp.float32(0)
    for own_BK, teacher_BK in zip(log_p, teacher_GBK, strict=False):
        q_BK = jax.lax.stop_gradient(jax.nn.softmax((teacher_BK - centre_K) / teacher_temperature))
        loss = loss - (q_BK * (total_BK - own_BK)).sum(-1).mean()
    return loss / (len(teacher_GBK) * (len(student_VBK) - 1))


def make(model: Backbone, info: Info, *, steps: Count, global_view: dict[str, Any], local_view: dict[str, Any],
         n_local: Natural = 8, n_prototypes: Count = 65536, hidden: Count = 2048, bottleneck: Count = 256,
         student_temperature: Positive = 0.1, teacher_temperature: tuple[Positive, Positive] = (0.04, 0.07),
         temperature_warmup: Natural = 0, momentum: tuple[Share, Share] = (0.996, 1.0),
         centre_momentum: Share = 0.9, freeze_prototypes: Natural = 0) -> Objective:
    """DINO with two global crops and `n_local` local ones.

    steps:               over which the teacher's momentum moves along a cosine.
    teacher_temperature: linear from the first to the second over `temperature_warmup` steps.
    freeze_prototypes:   steps in which the last layer stays as it was drawn.
    """
    views = [config.call(augmentation, global_view, "config.objective.global_view")] * 2
    local = config.call(augmentation, local_view, "config.objective.local_view")
    tower = Tower(model, {"head": Prototypes(hidden, bottleneck, n_prototypes, model.dtype)})

    def begin(params, stats):
        return {"teacher": jax.tree.map(jnp.copy, params), "student_stats": stats, "teacher_stats": stats,
                "centre": jnp.zeros(n_prototypes), "step": jnp.int32(0)}

    def loss(params, aux, crops):
        step, (large, small) = aux["step"], crops
        # The teacher follows the parameters that the last step left, so that it is part of this step.
        teacher = moving_average(aux["teacher"], params, cosine(step, steps, *momentum))
        with jax.named_scope("teacher"):
            of_teacher, teacher_stats = tower(teacher, aux["teacher_stats"], large)
        drawn = params["head"]["prototypes"]
        frozen = jnp.where(step < freeze_prototypes, jax.lax.stop_gradient(drawn), drawn)
        student = params | {"head": params["head"] | {"prototypes": frozen}}
        with jax.named_scope("student"):
            of_large, student_stats = tower(student, aux["student_stats"], large)
            logits_VBK = separate(of_large["head"], 2)
            if n_local:
                of_small, student_stats = tower(student, student_stats, small)
                logits_VBK += separate(of_small["head"], n_local)
        warm, final = teacher_temperature
        temperature = warm + (final - warm) * jnp.minimum(step / max(temperature_warmup, 1), 1.0)
        teacher_NK = jax.lax.stop_gradient(of_teacher["head"])
        value = self_distillation(logits_VBK, separate(teacher_NK, 2), aux["centre"], student_temperature, temperature)
        centre = moving_average(aux["centre"], teacher_NK.mean(0), centre_momentum)
        return value, {"teacher": teacher, "student_stats": student_stats, "teacher_stats": teacher_stats,
                       "centre": centre, "step": step + 1}

    def judged(params, aux):
        return aux["teacher"]["encoder"], aux["teacher_stats"]["encoder"]

    return objective(tower, info, Crops(views, local, n_local), loss, begin, judged)
