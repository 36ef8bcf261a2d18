"""DeepCluster v2: predict the cluster of an image's features of the last pass over the data (Caron et al. 2020).

B batch, N examples, J remembered views, D features, K clusters, H heads of them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sslx import flops
from sslx.config import Count, Natural, Positive, UserError
from sslx.data import Info
from sslx.layers import cross_entropy
from sslx.models import Backbone
from sslx.models.heads import Projector, unit
from sslx.objectives import Objective
from sslx.objectives.assignment import sinkhorn
from sslx.objectives.crops import multi
from sslx.objectives.joint import Tower, embedded, objective
from sslx.objectives.memory import lookup, spread, write
from sslx.sharding import replicate, spec_of

UNSEEN = -1


def k_means(x_ND, start_KD, iterations: int):
    """(centroids [K, D], cluster of each row [N]) of unit vectors, by spherical k-means from `start` on.

    Centroids are the directions of the sums of their rows; those without a row stay. Rows of zeros, which are yet to be
    seen, belong to UNSEEN and do not count.
    """
    known_N = jnp.square(x_ND).sum(1) > 0

    def nearest(centroid_KD):
        return jnp.einsum("nd,kd->nk", x_ND, centroid_KD).argmax(1)

    def move(centroid_KD, _):
        member_NK = jax.nn.one_hot(nearest(centroid_KD), len(start_KD)) * known_N[:, None]
        sum_KD = jnp.einsum("nk,nd->kd", member_NK, x_ND, out_sharding=jax.sharding.PartitionSpec())
        return jnp.where(member_NK.sum(0)[:, None] > 0, unit(sum_KD), centroid_KD), None

    centroid_KD = jax.lax.scan(move, start_KD, None, length=iterations)[0]
    return centroid_KD, jnp.where(known_N, nearest(centroid_KD), UNSEEN)


def cluster_prediction(logits_VBK, target_B):
    """Mean over crops and rows of -log softmax(logits) at the row's cluster; a sequence of [B, K]."""
    return sum(cross_entropy(x_BK, target_B).mean() for x_BK in logits_VBK) / len(logits_VBK)


def make(model: Backbone, info: Info, n_examples: int, *, global_view: dict[str, Any], local_view: dict[str, Any],
         second: dict[str, Any] | None = None, n_local: Natural = 6, clusters: tuple[Count, ...] = (3000, 3000, 3000),
         passes: Positive = 1.0, iterations: Count = 10, temperature: Positive = 0.1, hidden: Count = 2048,
         features: Count = 128) -> Objective:
    """DeepCluster v2: each head clusters the features of one of two global crops, and every crop predicts its cluster.

    global_view, local_view: arguments of `views.image.augmentation`. second: what is otherwise in the second global
                view.
    clusters:   of each head.
    passes:     over the data, in whole batches, after which features are clustered anew by `iterations` of k-means.
                Until an image was clustered, it is in the cluster that Sinkhorn's algorithm gives its first
                crop most of: balanced, as the nearest one would not stay.
    Raises UserError if fewer images are seen by then than there are clusters.
    """
    if max(clusters) > n_examples:
        raise UserError(f"config.objective.clusters={clusters} are more than the {n_examples} examples of"
                        " config.data.train")
    crops = multi(global_view, second, local_view, n_local)
    tower = Tower(model, {"projector": Projector(hidden, features, 2, model.dtype, normed=False, bias=True)})

    def begin(params, stats, drawn):
        start = [unit(jax.random.normal(jax.random.fold_in(drawn.key, h), (k, features)))
                 for h, k in enumerate(clusters)]
        unseen_ND = spread(n_examples, features)
        return {"stats": stats, "step": jnp.int32(0), "memory": [unseen_ND] * 2, "centroids": start,
                "cluster": [jnp.full(len(unseen_ND), UNSEEN) for _ in clusters]}

    def period(rows):
        """Calls of the loss, each with so many rows, from one clustering to the next."""
        every = max(1, int(passes * n_examples) // rows)
        if every * rows < max(clusters):
            raise UserError(f"config.objective.passes={passes} of batches of {rows} are {every * rows} images, fewer"
                            f" than config.objective.clusters={clusters}")
        return every

    def clustered(key, memory, every):
        """(centroids, clusters) of every head."""
        found = []
        for h, k in enumerate(clusters):
            x_ND = memory[h % 2]
            known_N = replicate(jnp.square(x_ND).sum(1) > 0)
            chance_N = jnp.where(known_N, jax.random.uniform(jax.random.fold_in(key, h), known_N.shape), -1)
            drawn_K = jax.lax.top_k(chance_N, k)[1]
            with flops.scaled(1, every):  # on average over steps
                found.append(k_means(x_ND, lookup(x_ND, drawn_K), iterations))
        centroids, cluster = zip(*found, strict=True)
        return list(centroids), [replicate(x_N) for x_N in cluster]

    def loss(params, aux, drawn):
        index_B, step = drawn.batch["index"], aux["step"]
        every = period(len(index_B))
        centroids, cluster = jax.lax.cond(
            (step % every == 0) & (step > 0), functools.partial(clustered, every=every),
            lambda *_: (aux["centroids"], aux["cluster"]), drawn.key, aux["memory"])
        made, stats = embedded(tower, params, aux["stats"], crops, drawn)
        z_VBD = [unit(x) for x in made["projector"]]
        value = jnp.float32(0)
        for centroid_KD, cluster_N in zip(centroids, cluster, strict=True):
            logits_VBK = [jnp.einsum("bd,kd->bk", z_BD, centroid_KD) / temperature for z_BD in z_VBD]
            known_B = cluster_N.at[index_B].get(out_sharding=spec_of(index_B))
            target_B = jnp.where((known_B == UNSEEN) | (index_B < 0), sinkhorn(logits_VBK[0], 1.0).argmax(1), known_B)
            value += cluster_prediction(logits_VBK, target_B) / len(clusters)
        memory = [write(x_ND, index_B, z_BD) for x_ND, z_BD in zip(aux["memory"], z_VBD[:2], strict=True)]
        return value, {"stats": stats, "step": step + 1, "memory": memory, "centroids": centroids, "cluster": cluster}

    return objective(tower, info, crops, loss, begin, reads=("index",))
