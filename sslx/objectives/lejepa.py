"""LeJEPA: views are alike, and their projections an isotropic Gaussian (Balestriero and LeCun 2025).

V views, B batch, D features, M directions, T knots.
"""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from sslx import config
from sslx.config import LARGEST_INT, Count, Natural, Only, Positive, Share, UserError
from sslx.data import Info
from sslx.models import Backbone
from sslx.models.heads import Projector, unit
from sslx.objectives import Objective
from sslx.objectives.crops import Crops
from sslx.objectives.joint import Tower, embedded, objective
from sslx.views.image import augmentation

Knots = Annotated[int, Only(lambda n: 2 <= n <= LARGEST_INT, "an integer of at least 2")]


def sigreg(x_BD, directions_DM, knots: int = 17, furthest: float = 3.0):
    """How far projections a.x are from a standard normal: the mean over directions a of the Epps-Pulley statistic.

    B int_{-f}^{f} |mean_b exp(i t a.x_b) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt, by the trapezoidal rule on the `knots` of
    t >= 0.
    """
    t_T = np.linspace(0, furthest, knots)
    normal_T = np.exp(-t_T**2 / 2)
    weight_T = 2 * np.gradient(t_T) * normal_T
    weight_T[[0, -1]] /= 2
    projected_BM = jnp.einsum("bd,dm->bm", x_BD, directions_DM, precision="highest")
    angle_BMT = projected_BM[..., None] * jnp.float32(t_T)
    error_MT = jnp.square(jnp.cos(angle_BMT).mean(0) - normal_T) + jnp.square(jnp.sin(angle_BMT).mean(0))
    return len(x_BD) * (error_MT * weight_T).sum(-1).mean()


def alike(z_VBD, n_global: int):
    """Mean over views of (z_v - mean of the first `n_global` views' z)^2; a sequence of [B, D]."""
    centre_BD = sum(z_VBD[:n_global]) / n_global
    return sum(jnp.square(z_BD - centre_BD).mean() for z_BD in z_VBD) / len(z_VBD)


def make(model: Backbone, info: Info, *, global_view: dict[str, Any], local_view: dict[str, Any], n_global: Count = 2,
         n_local: Natural = 6, weight: Share = 0.05, directions: Count = 1024, knots: Knots = 17,
         furthest: Positive = 3.0, hidden: Count = 2048, features: Count = 128) -> Objective:
    """LeJEPA: (1 - w) `alike` + w `sigreg`, the mean over views.

    global_view, local_view: arguments of `views.image.augmentation`.
    weight:     w of SIGReg, along `directions` that are drawn anew at each step.
    knots, furthest: of its integral.
    """
    if n_global + n_local < 2:
        raise UserError(f"config.objective.n_local={n_local} leaves no view to compare with: it takes 1, or n_global=2")
    tower = Tower(model, {"projector": Projector(hidden, features, 3, model.dtype, normed=False)})
    views = [config.call(augmentation, global_view, "config.objective.global_view")] * n_global
    crops = Crops(views, config.call(augmentation, local_view, "config.objective.local_view"), n_local)

    def loss(params, aux, drawn):
        made, stats = embedded(tower, params, aux["stats"], crops, drawn)
        z = [x.astype(jnp.float32) for x in made["projector"]]
        axes = unit(jax.random.normal(drawn.key, (features, directions)), axis=0)
        normal = sum(sigreg(x, axes, knots, furthest) for x in z) / len(z)
        return (1 - weight) * alike(z, n_global) + weight * normal, {"stats": stats}

    return objective(tower, info, crops, loss)
