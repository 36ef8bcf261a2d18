"""DINOv2: iBOT with heads apart, Sinkhorn centring and KoLeo (Oquab et al. 2024), and Gram anchoring (DINOv3)."""

from typing import Any

from sslx.config import Count, Natural, Nonnegative, Positive, Share, Steps, UserError
from sslx.data import Info
from sslx.models.vit import VisionTransformer
from sslx.objectives import Objective
from sslx.objectives.crops import multi
from sslx.objectives.masked_distillation import by_sinkhorn, masked_distillation
from sslx.objectives.token_tower import Head, TokenTower, check_tokens
from sslx.views.image import Shares


def make(model: VisionTransformer, info: Info, *, steps: Count, global_view: dict[str, Any], local_view: dict[str, Any],
         second: dict[str, Any] | None = None, n_local: Natural = 8, mask_ratio: Shares = (0.1, 0.5),
         mask_probability: Share = 0.5, n_prototypes: Count = 131072, hidden: Count = 2048, bottleneck: Count = 384,
         patch_bottleneck: Count = 256,
         patch_weight: Nonnegative = 1.0, koleo_weight: Nonnegative = 0.1, gram_weight: Nonnegative = 0.0,
         gram_anchor: Steps = 0, gram_from: Steps = 0, gram_every: Steps = 10_000, student_temperature: Positive = 0.1,
         teacher_temperature: tuple[Positive, Positive] = (0.04, 0.07), temperature_warmup: Steps,
         iterations: Count = 3, momentum: tuple[Share, Share] = (0.992, 1.0),
         batch_norm: bool = False) -> Objective:
    """DINOv2, of a vision transformer with a class token; registers, LayerScale and `drop` are the model's.

    steps:               over which the teacher's momentum moves along a cosine.
    global_view, local_view: arguments of `views.image.augmentation`. second: what is otherwise in the second global
                         view.
    mask_ratio, mask_probability: of `views.image.block_masks`, of the large crops.
    patch_weight, koleo_weight: of the prediction of hidden patches, and of `koleo` of the class tokens.
    bottleneck, patch_bottleneck: dimensions in which class tokens and patches meet their prototypes.
    gram_weight:         of `gram_anchoring` of patches from step `gram_from` on, to those of the teacher as it was at
                         step `gram_anchor` (0: at `gram_from`), and anew every `gram_every` steps after `gram_from` (0:
                         never). DINOv3: 2, from step 10^6 on, to a teacher of the first 2 x 10^5, whose patches were
                         better. Unless it is 0 the anchor is carried, and its forward pass made, from step 0 on.
    teacher_temperature: linear from the first to the second over `temperature_warmup` steps.
    iterations:          of Sinkhorn's algorithm.
    batch_norm:          between the layers of the heads' MLPs: see dino; its moments are of all patches with logits.
    """
    check_tokens(model, global_view)
    if gram_weight and not gram_anchor <= gram_from > 0:
        raise UserError(f"config.objective.gram_from={gram_from} of gram_weight={gram_weight} must be a step that the"
                        f" teacher has learnt until, and gram_anchor={gram_anchor} no later one")
    heads = {name: Head(hidden, neck, n_prototypes, model.dtype, batch_norm)
             for name, neck in (("head", bottleneck), ("patch_head", patch_bottleneck))}
    return masked_distillation(
        TokenTower(model, heads), info, multi(global_view, second, local_view, n_local), by_sinkhorn(iterations),
        steps=steps, momentum=momentum, mask_ratio=mask_ratio, mask_probability=mask_probability,
        patch_weight=patch_weight, student_temperature=student_temperature, teacher_temperature=teacher_temperature,
        temperature_warmup=temperature_warmup, koleo_weight=koleo_weight, gram_weight=gram_weight,
        gram_anchor=gram_anchor, gram_from=gram_from, gram_every=gram_every)
