"""iBOT: a student finds its teacher's assignments of other crops, and of patches hidden from it (Zhou et al. 2022)."""

from typing import Any

from sslx.config import Count, Natural, Nonnegative, Positive, Share, Steps
from sslx.data import Info
from sslx.models.vit import VisionTransformer
from sslx.objectives import Objective
from sslx.objectives.crops import multi
from sslx.objectives.masked_distillation import by_mean, masked_distillation
from sslx.objectives.token_tower import Head, TokenTower, check_tokens
from sslx.views.image import Shares


def make(model: VisionTransformer, info: Info, *, steps: Count, global_view: dict[str, Any], local_view: dict[str, Any],
         second: dict[str, Any] | None = None, n_local: Natural = 10, mask_ratio: Shares = (0.1, 0.5),
         mask_probability: Share = 0.5, n_prototypes: Count = 8192, shared_head: bool = True, hidden: Count = 2048,
         bottleneck: Count = 256, patch_weight: Nonnegative = 1.0, student_temperature: Positive = 0.1,
         teacher_temperature: tuple[Positive, Positive] = (0.04, 0.07), temperature_warmup: Steps,
         momentum: tuple[Share, Share] = (0.996, 1.0), centre_momentum: Share = 0.9,
         batch_norm: bool = False) -> Objective:
    """iBOT, of a vision transformer with a class token.

    steps:               over which the teacher's momentum moves along a cosine.
    global_view, local_view: arguments of `views.image.augmentation`. second: what is otherwise in the second global
                         view.
    mask_ratio, mask_probability: of `views.image.block_masks`, of the large crops.
    shared_head:         the same MLP and prototypes for class token and patches.
    patch_weight:        of the prediction of hidden patches.
    centre_momentum:     of the centres, the moving means of the teacher's logits of class tokens and of hidden patches.
    teacher_temperature: linear from the first to the second over `temperature_warmup` steps.
    batch_norm:          between the layers of the MLP: see dino; its moments are of all patches with logits.
    """
    check_tokens(model, global_view)
    head = Head(hidden, bottleneck, n_prototypes, model.dtype, batch_norm)
    tower = TokenTower(model, {"head": head} if shared_head else {"head": head, "patch_head": head})
    return masked_distillation(
        tower, info, multi(global_view, second, local_view, n_local), by_mean(centre_momentum), steps=steps,
        momentum=momentum, mask_ratio=mask_ratio, mask_probability=mask_probability, patch_weight=patch_weight,
        student_temperature=student_temperature, teacher_temperature=teacher_temperature,
        temperature_warmup=temperature_warmup)
