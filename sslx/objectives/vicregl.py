"""VICRegL: VICReg of whole images, and of places of them that lie or look alike (Bardes et al. 2022b).

B batch, N = B V views, P places of a view, M matches, D features.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sslx.config import Count, Nonnegative, Share, UserError
from sslx.data import Info
from sslx.models import Backbone
from sslx.models.heads import Projector
from sslx.objectives import Objective
from sslx.objectives.crops import pair
from sslx.objectives.joint import Tower, objective
from sslx.objectives.vicreg import regularized
from sslx.views import separate
from sslx.views.image import centres


class Expanders(nn.Module):
    """What VICReg compares of images, [N, E], and of each place in them, [N, h w, F]."""

    features: int
    local_features: int
    dtype: Any

    @nn.compact
    def __call__(self, seen, *, train: bool):
        features_ND, maps_NhwD = seen
        whole, local = (Projector(f, f, 3, self.dtype, normed=False, name=name)
                        for name, f in (("whole", self.features), ("local", self.local_features)))
        places_NPD = maps_NhwD.reshape(len(maps_NhwD), -1, maps_NhwD.shape[-1])
        return whole(features_ND, train=train), local(places_NPD, train=train)


def distances(a_BPD, b_BQD):
    """|a_p - b_q|^2, [B, P, Q], without a gradient."""
    a_BPD, b_BQD = jax.lax.stop_gradient((a_BPD, b_BQD))
    product_BPQ = jnp.einsum("bpd,bqd->bpq", a_BPD, b_BQD, precision="highest")
    return jnp.square(a_BPD).sum(-1)[:, :, None] + jnp.square(b_BQD).sum(-1)[:, None] - 2 * product_BPQ


def matched(a_BPD, b_BQD, distance_BPQ, n: int):
    """The n places of a that are nearest to one of b, and these: two of [B, n, D], the nearest first."""
    chosen_BM = jax.lax.top_k(-distance_BPQ.min(2), n)[1]
    nearest_BM = jnp.take_along_axis(distance_BPQ.argmin(2), chosen_BM, 1)
    return (jnp.take_along_axis(a_BPD, chosen_BM[..., None], 1),
            jnp.take_along_axis(b_BQD, nearest_BM[..., None], 1))


def local_criterion(a_BPD, b_BPD, place_a_BP2, place_b_BP2, n: int, weights):
    """`regularized` of matches by place + of matches by feature, each the mean of those from a to b and back."""
    value = jnp.float32(0)
    for x, y in ((place_a_BP2, place_b_BP2), (a_BPD, b_BPD)):
        distance_BPQ = distances(x, y)
        for left, right, d in ((a_BPD, b_BPD, distance_BPQ), (b_BPD, a_BPD, distance_BPQ.swapaxes(1, 2))):
            x_BMD, y_BMD = matched(left, right, d, n)
            value += regularized(x_BMD, y_BMD, weights) / 2
    return value


def make(model: Backbone, info: Info, *, view: dict[str, Any], second: dict[str, Any] | None = None,
         weights: tuple[Nonnegative, Nonnegative, Nonnegative] = (25.0, 25.0, 1.0), whole_weight: Share = 0.75,
         matches: Count = 20, features: Count = 8192, local_features: Count = 512) -> Objective:
    """VICRegL: w of the whole + (1 - w) `local_criterion`.

    view:     arguments of `views.image.augmentation`. second: what is otherwise in the second view.
    weights:  of invariance, variance and covariance, the means of both sides.
    whole_weight: w.
    matches:  places of a view that are compared, those with the nearest in the other view.
              Raises UserError if the maps have fewer.
    features, local_features: of the expanders, three layers each, of the whole and of each place.
    """
    tower = Tower(model, {"expander": Expanders(features, local_features, model.dtype)}, "maps")
    crops = pair(view, second)

    def loss(params, aux, drawn):
        made, stats = tower(params, aux["stats"], drawn.large, drawn.key)
        (whole_a, whole_b), places = (separate(x.astype(jnp.float32), 2) for x in made["expander"])
        rows, cols = made["encoder"][1].shape[1:3]
        if matches > rows * cols:
            raise UserError(f"config.objective.matches={matches} of the {rows} x {cols} places of a view: choose fewer,"
                            " or a network with larger maps")
        lie = [centres(box, rows, cols).reshape(-1, rows * cols, 2)
               for box in crops.where(drawn.crops, drawn.batch["image"])]
        value = whole_weight * regularized(whole_a, whole_b, weights)
        return value + (1 - whole_weight) * local_criterion(*places, *lie, matches, weights), {"stats": stats}

    return objective(tower, info, crops, loss)
