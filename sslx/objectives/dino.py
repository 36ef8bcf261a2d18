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
from sslx.models import encode as encode_images
from sslx.models.heads import Prototypes
from sslx.objectives import Objective
from sslx.objectives.image import check_images, grid_patches
from sslx.views import separate
from sslx.views.image import augmentation, multi_crop, to_float


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


def cosine(step, steps: int, first: float, last: float):
    """From `first` to `last` along half a cosine over `steps` steps."""
    progress = jnp.minimum(step / steps, 1.0)
    return last + (first - last) * (1 + jnp.cos(jnp.pi * progress)) / 2


def moving_average(old, new, momentum):
    """m old + (1 - m) new, leaf by leaf, without a gradient."""
    return jax.tree.map(lambda o, n: momentum * o + (1 - momentum) * jax.lax.stop_gradient(n), old, new)


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
    check_images(model, info)
    views = [config.call(augmentation, global_view, "config.objective.global_view")] * 2
    local = config.call(augmentation, local_view, "config.objective.local_view")
    head = Prototypes(hidden, bottleneck, n_prototypes, model.dtype)

    def init(key, batch):
        key_encoder, key_head = jax.random.split(key)
        images = views[0](key, batch["image"])
        encoder = dict(model.init(key_encoder, images, train=True, method="encode"))
        h_BD = model.apply(encoder, images, train=False, method="encode")
        params = {"encoder": encoder.pop("params"), "head": head.init(key_head, h_BD)["params"]}
        aux = {"teacher": jax.tree.map(jnp.copy, params), "student_stats": encoder, "teacher_stats": encoder,
               "centre": jnp.zeros(n_prototypes), "step": jnp.int32(0)}
        return params, aux

    def network(params, stats, images):
        h_BD, stats = encode_images(model, params["encoder"], stats, images, train=True)
        return head.apply({"params": params["head"]}, h_BD), stats

    def loss(params, aux, batch, key):
        step = aux["step"]
        large, small = multi_crop(key, batch["image"], views, local, n_local)
        # The teacher follows the parameters that the last step left, so that it is part of this step.
        teacher = moving_average(aux["teacher"], params, cosine(step, steps, *momentum))
        with jax.named_scope("teacher"):
            teacher_NK, teacher_stats = network(teacher, aux["teacher_stats"], large)
        drawn = params["head"]["prototypes"]
        frozen = jnp.where(step < freeze_prototypes, jax.lax.stop_gradient(drawn), drawn)
        student = params | {"head": params["head"] | {"prototypes": frozen}}
        with jax.named_scope("student"):
            large_NK, student_stats = network(student, aux["student_stats"], large)
            outputs = separate(large_NK, 2)
            if n_local:
                small_NK, student_stats = network(student, student_stats, small)
                outputs += separate(small_NK, n_local)
        warm, final = teacher_temperature
        temperature = warm + (final - warm) * jnp.minimum(step / max(temperature_warmup, 1), 1.0)
        teacher_GBK = separate(jax.lax.stop_gradient(teacher_NK), 2)
        value = self_distillation(outputs, teacher_GBK, aux["centre"], student_temperature, temperature)
        centre = moving_average(aux["centre"], teacher_NK.mean(0), centre_momentum)
        aux = {"teacher": teacher, "student_stats": student_stats, "teacher_stats": teacher_stats, "centre": centre,
               "step": step + 1}
        return value, (aux, {"loss": value, "tokens": jnp.int32(len(batch["image"]) * grid_patches(model, info))})

    def encode(params, aux, batch):
        images, encoder = to_float(batch["image"]), aux["teacher"]["encoder"]
        return encode_images(model, encoder, aux["teacher_stats"], images, train=False)[0].astype(jnp.float32)

    def show(params, aux, batch, key):
        large, small = multi_crop(key, batch["image"], views, local, n_local)
        shown = {"input": to_float(batch["image"])}
        shown |= {f"large crop {i + 1}": crop for i, crop in enumerate(separate(large, 2))}
        if n_local:
            shown |= {f"small crop {i + 1}": crop for i, crop in enumerate(separate(small, n_local)[:4])}
        return shown

    return Objective(init, loss, encode, show)
