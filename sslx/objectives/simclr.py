"""SimCLR: agree between two views of an image, against all other images of the global batch (Chen et al. 2020).

B batch, V both views, N = B V, D projection, C chunks of M candidates.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from sslx.config import Count, Positive, UserError
from sslx.data import Info
from sslx.models import Backbone
from sslx.models.heads import Projector, unit
from sslx.objectives import Objective
from sslx.objectives.joint import Tower, objective, pair
from sslx.sharding import replicate, spec
from sslx.views import separate


def nt_xent(a_BD, b_BD, temperature: float, chunks: int = 1):
    """Normalized temperature-scaled cross-entropy of pairs (a_i, b_i), unit vectors; a number.

    l(a_i) = -log exp(a_i.b_i / t) / (sum_{j != i} exp(a_i.a_j / t) + sum_j exp(a_i.b_j / t)),
    averaged over all 2 B vectors. A device holds the products of its rows with one of `chunks` parts of the
    candidates at a time. Raises UserError if `chunks` does not divide 2 B.
    """
    chex.assert_equal_shape([a_BD, b_BD])
    B, D = a_BD.shape
    if chunks < 1 or 2 * B % chunks:
        raise UserError(f"config.objective.chunks={chunks} does not divide the {2 * B} views of a batch;"
                        " choose a positive number that does")
    z_BVD, id_N = jnp.stack([a_BD, b_BD], 1), jnp.arange(2 * B)
    id_BV = jax.sharding.reshard(id_N.reshape(B, 2), spec("batch"))

    def log_sum(_, part):
        id_M, z_MD = part
        logits_BVM = jnp.einsum("bvd,md->bvm", z_BVD, z_MD) / temperature
        # Finite, because a part may hold nothing but a row's own vector.
        return None, jax.nn.logsumexp(jnp.where(id_BV[..., None] == id_M, -1e30, logits_BVM), -1)

    parts = id_N.reshape(chunks, -1), replicate(z_BVD).reshape(chunks, -1, D)
    log_sum_CBV = jax.lax.scan(log_sum if chunks == 1 else jax.checkpoint(log_sum), None, parts)[1]
    return jax.nn.logsumexp(log_sum_CBV, 0).mean() - (a_BD * b_BD).sum(1).mean() / temperature


def make(model: Backbone, info: Info, *, view: dict[str, Any], second: dict[str, Any] | None = None,
         temperature: Positive = 0.1, chunks: Count = 1, hidden: Count = 2048, features: Count = 128,
         depth: Count = 2) -> Objective:
    """SimCLR with a projector of `depth` layers.

    view:   arguments of `views.image.augmentation`. second: what is otherwise in the second view.
    chunks: in which the products of all pairs are made, and made again for the gradient: for batches of thousands.
    """
    tower = Tower(model, {"projector": Projector(hidden, features, depth, model.dtype)})

    def loss(params, aux, crops):
        made, stats = tower(params, aux["stats"], crops[0])
        with jax.named_scope("loss"):
            return nt_xent(*separate(unit(made["projector"]), 2), temperature, chunks), {"stats": stats}

    return objective(tower, info, pair(view, second), loss)
