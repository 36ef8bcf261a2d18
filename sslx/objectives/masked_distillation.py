"""Masked self-distillation: the teacher's assignments of other crops, and of patches that are hidden from the student.

N images of both large crops, T patches of an image, M hidden ones, K prototypes, D features.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sslx.config import Count, Nonnegative, Positive, Share, Steps
from sslx.data import Info
from sslx.models.heads import unit
from sslx.objectives import Objective
from sslx.objectives.assignment import centred, sinkhorn, swapped_prediction
from sslx.objectives.crops import Crops
from sslx.objectives.joint import objective
from sslx.objectives.teacher import Teacher, linear, moving_average
from sslx.objectives.token_tower import TokenTower
from sslx.sharding import replicate, spec
from sslx.views import separate
from sslx.views.image import Shares, block_masks


class Centring(NamedTuple):
    """How logits of a teacher become assignments: (logits, state, temperature, counted) -> (assignments, state).

    begin: K -> state.
    """

    begin: Callable
    assign: Callable


def by_mean(momentum: float) -> Centring:
    """A softmax of what is beyond the moving mean of each prototype's logits, as in DINO."""

    def assign(logits, centre_K, temperature, counted):
        axes = tuple(range(logits.ndim - 1))
        n = counted.sum()
        mean_K = (logits * counted[..., None]).sum(axes) / jnp.maximum(n, 1)
        moved_K = moving_average(centre_K, mean_K, jnp.where(n > 0, momentum, 1.0))
        return centred(logits, centre_K, temperature), moved_K

    return Centring(jnp.zeros, assign)


def by_sinkhorn(iterations: int) -> Centring:
    """Sinkhorn's algorithm over the global batch, as in SwAV; nothing is carried."""

    def assign(logits, nothing, temperature, counted):
        return sinkhorn(logits, temperature, iterations, counted[..., None]), nothing

    return Centring(lambda K: None, assign)


def masked_prediction(student_NMK, assigned_NMK, weight_NM):
    """-sum_m w_m sum_k q_mk log softmax(student_m)_k, the mean over images."""
    nll_NM = -(assigned_NMK * jax.nn.log_softmax(student_NMK)).sum(-1)
    return (weight_NM * nll_NM).sum(1).mean()


def koleo(x_BD):
    """-mean_i log min_{j != i} |x_i - x_j| of unit vectors of the global batch (Sablayrolles et al. 2019)."""
    x_BD = unit(x_BD)
    x_ND, B = replicate(x_BD), len(x_BD)
    with jax.named_scope("koleo"):
        cosine_BN = jnp.einsum("bd,nd->bn", jax.lax.stop_gradient(x_BD), jax.lax.stop_gradient(x_ND))
        own_B = jax.sharding.reshard(jnp.arange(B), spec("batch"))
        nearest_B = jnp.where(own_B[:, None] == jnp.arange(B), -2.0, cosine_BN).argmax(1)
        nearest_BD = x_ND.at[nearest_B].get(out_sharding=spec("batch"))
        return -jnp.log(jnp.sqrt(jnp.square(x_BD - nearest_BD + 1e-6).sum(1)) + 1e-8).mean()


def gram_anchoring(x_NTD, anchor_NTD):
    """Mean square difference of the cosines between all patches of an image, and of those of the anchor (DINOv3)."""
    def cosines(x_NTD):
        return jnp.einsum("ntd,nsd->nts", unit(x_NTD), unit(x_NTD))

    return jnp.square(cosines(x_NTD) - jax.lax.stop_gradient(cosines(anchor_NTD))).mean()


def masked_distillation(
    tower: TokenTower, info: Info, crops: Crops, centring: Centring, *, steps: Count, momentum: tuple[Share, Share],
    mask_ratio: Shares, mask_probability: Share, patch_weight: Nonnegative, student_temperature: Positive,
    teacher_temperature: tuple[Positive, Positive], temperature_warmup: Steps,
    koleo_weight: Nonnegative = 0.0, gram_weight: Nonnegative = 0.0,
    gram_anchor: Steps = 0, gram_from: Steps = 0, gram_every: Steps = 0) -> Objective:
    """The objective of iBOT and DINOv2, which say what the options are.

    `swapped_prediction` of class tokens over all crops + w_p `masked_prediction` of patches of the large ones
    + w_k the sum of `koleo` of each large crop's class tokens + w_g `gram_anchoring` of their patches.
    """
    teacher, n_large = Teacher(tower, steps, momentum), len(crops.large)
    grid = tuple(tower.backbone.grid)
    patch_head = tower.heads.get("patch_head", tower.heads["head"])

    def begin(params, stats, drawn):
        carried = {"teacher": teacher.begin(params, stats),
                   "centre": centring.begin(tower.heads["head"].n_prototypes),
                   "patch_centre": centring.begin(patch_head.n_prototypes)}
        return carried | ({"anchor": jax.tree.map(jnp.copy, params["encoder"])} if gram_weight else {})

    def loss(params, aux, drawn):
        step, keys = aux["teacher"]["step"], jax.random.split(drawn.key, 3)
        hidden, ids_NM, weight_NM = block_masks(keys[0], len(drawn.large), grid, mask_ratio, mask_probability)
        followed = teacher.follow(aux["teacher"], params)
        with jax.named_scope("teacher"):
            of_teacher = jax.lax.stop_gradient(tower(followed["params"], drawn.large, None, ids_NM))
        with jax.named_scope("student"):
            made = tower(params, drawn.large, hidden, ids_NM, keys[1])
            logits_VBK = separate(made.cls_logits, n_large)
            if drawn.small is not None:
                logits_VBK += separate(tower(params, drawn.small, key=keys[2]).cls_logits, crops.n_small)
        temperature = linear(step, temperature_warmup, *teacher_temperature)
        every = jnp.ones(len(drawn.large), bool)
        assigned, centre = centring.assign(of_teacher.cls_logits, aux["centre"], temperature, every)
        patches, patch_centre = centring.assign(of_teacher.patch_logits, aux["patch_centre"], temperature,
                                                weight_NM > 0)
        value = swapped_prediction([x / student_temperature for x in logits_VBK], separate(assigned, n_large))
        value += patch_weight * masked_prediction(made.patch_logits / student_temperature, patches, weight_NM)
        carried = {"teacher": followed, "centre": centre, "patch_centre": patch_centre}
        if koleo_weight:
            value += koleo_weight * sum(koleo(x) for x in separate(made.cls, n_large))
        if gram_weight:
            due = step == (gram_anchor or gram_from)
            if gram_every:
                due |= (step > gram_from) & ((step - gram_from) % gram_every == 0)
            anchor = jax.tree.map(lambda old, new: jnp.where(due, new, old), aux["anchor"],
                                  followed["params"]["encoder"])
            with jax.named_scope("anchor"):
                anchored = tower.backbone.apply({"params": anchor}, drawn.large)[:, 1:]
            value += jnp.where(step < gram_from, 0, gram_weight) * gram_anchoring(made.patches, anchored)
            carried["anchor"] = anchor
        return value, carried

    return objective(tower, info, crops, loss, begin, teacher.judged)
