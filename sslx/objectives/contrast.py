"""Contrast of vectors with many others: sums of exponentials in parts, and queues of what earlier batches left.

B batch, V views, D features, C parts of M candidates; a queue of S slots of W rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from sslx.config import UserError
from sslx.models.heads import unit
from sslx.sharding import axis_size, replicate, spec


def log_sum_exp(rows_BVD, candidates_ND, temperature, chunks: int = 1, own_BV=None):
    """log sum_n exp(x . c_n / t) over all candidates but, if given, a row's own; float32 [B, V].

    A device holds the products of its rows with one of `chunks` parts of the candidates at a time. Raises UserError if
    `chunks` does not divide the candidates.
    """
    def log_sum(id_M, c_MD):
        logits_BVM = jnp.einsum("bvd,md->bvm", rows_BVD, c_MD) / temperature
        if own_BV is not None:  # finite, because a part may hold nothing but a row's own vector
            logits_BVM = jnp.where(own_BV[..., None] == id_M, -1e30, logits_BVM)
        return jax.nn.logsumexp(logits_BVM, -1)

    return jax.nn.logsumexp(in_parts(log_sum, candidates_ND, chunks), 0)


def in_parts(f: Callable, candidates_ND, chunks: int):
    """f(ids [M], candidates [M, D]) of each of `chunks` parts of the candidates in turn, [C, ...], keeping no more.

    Raises UserError if `chunks` does not divide them.
    """
    N, D = candidates_ND.shape
    if chunks < 1 or N % chunks:
        raise UserError(f"config.objective.chunks={chunks} does not divide the {N} views of a batch;"
                        " choose a positive number that does")
    parts = jnp.arange(N).reshape(chunks, -1), replicate(candidates_ND).reshape(chunks, -1, D)
    body = f if chunks == 1 else jax.checkpoint(f)
    return jax.lax.scan(lambda _, part: (None, body(*part)), None, parts)[1]


def among_views(a_BD, b_BD, temperature, chunks: int = 1):
    """(both views side by side [B, 2, D], `log_sum_exp` of each against all others of both [B, 2])"""
    B, D = a_BD.shape
    z_BVD = jnp.stack([a_BD, b_BD], 1)
    own_BV = jax.sharding.reshard(jnp.arange(2 * B).reshape(B, 2), spec("batch"))
    return z_BVD, log_sum_exp(z_BVD, z_BVD.reshape(2 * B, D), temperature, chunks, own_BV)


def info_nce(queries_BD, keys_BD, temperature, chunks: int = 1):
    """Mean over i of -log exp(q_i.k_i / t) / sum_j exp(q_i.k_j / t), of unit vectors (van den Oord et al. 2018)."""
    chex.assert_equal_shape([queries_BD, keys_BD])
    log_sums = log_sum_exp(queries_BD[:, None], keys_BD, temperature, chunks)
    return log_sums.mean() - (queries_BD * keys_BD).sum(1).mean() / temperature


class Queue(NamedTuple):
    """The newest `size` unit vectors of earlier batches, at first random: a memory that gets no gradient.

    It lies in slots of a batch, [S, W, D], and a batch's rows stay where they were made. Carried are {"rows", "next"}.
    """

    size: int
    features: int

    def begin(self, key, rows: int):
        """A queue filled by batches of `rows`. Raises UserError unless they divide its size."""
        if self.size % rows:
            raise UserError(f"config.objective.queue={self.size} is no multiple of the {rows} images of a batch")
        shape, lying = (self.size // rows, rows, self.features), spec(None, "batch")
        return {"rows": unit(jax.random.normal(key, shape, out_sharding=lying)), "next": jnp.int32(0)}

    def slots(self, carried, rows: int):
        """All of the queue, [S, W, D], in slots of `rows`, which may be a part of the batch that it was made for."""
        S, W, D = carried["rows"].shape
        if W % rows:
            raise UserError(f"a queue filled by batches of {W} rows takes batches that divide {W}, not {rows}:"
                            " see run.accumulate and evals.batch_size")
        parts = jnp.reshape(carried["rows"], (S, rows, W // rows, D), out_sharding=spec(None, "batch"))
        return jnp.moveaxis(parts, 2, 1).reshape(-1, rows, D)

    def push(self, carried, new_BD):
        """The queue with these unit vectors in place of its oldest; of more than a slot has, with some of them."""
        S, W, D = carried["rows"].shape
        if (B := len(new_BD)) % W == 0:
            new_BD, B = jnp.reshape(new_BD, (W, -1, D), out_sharding=spec("batch"))[:, 0], W
        slots = self.slots(carried, B)
        at = carried["next"] // B
        slots = jax.lax.dynamic_update_index_in_dim(slots, jax.lax.stop_gradient(new_BD), at, 0)
        rows = jnp.moveaxis(slots.reshape(S, W // B, B, D), 1, 2)
        rows = jnp.reshape(rows, (S, W, D), out_sharding=spec(None, "batch"))
        return {"rows": rows, "next": (carried["next"] + B) % self.size}

    def log_sum_exp(self, carried, rows_BD, temperature):
        """log sum_n exp(x . c_n / t) over the queue, [B]: each device's part of it with all rows, then the sum."""
        logits_BSW = jnp.einsum("bd,swd->bsw", replicate(rows_BD), carried["rows"]) / temperature
        return jax.sharding.reshard(jax.nn.logsumexp(logits_BSW, (1, 2)), spec("batch"))

    def nearest(self, carried, rows_BD):
        """The vector of the queue with the greatest product with each row, [B, D], without a gradient."""
        S, W, D = carried["rows"].shape
        n = axis_size("batch")  # parts of the queue, each on a device
        part_PSD = jnp.reshape(jnp.moveaxis(carried["rows"], 1, 0), (n, W // n * S, D), out_sharding=spec("batch"))
        product_PBS = jnp.einsum("bd,psd->pbs", replicate(jax.lax.stop_gradient(rows_BD)), part_PSD)
        best_PB = product_PBS.argmax(-1)
        found_PBD = jnp.take_along_axis(part_PSD, best_PB[..., None], 1)
        nearest_B = replicate(product_PBS.max(-1)).argmax(0)
        found_BD = jnp.take_along_axis(replicate(found_PBD), nearest_B[None, :, None], 0)[0]
        return jax.sharding.reshard(jax.lax.stop_gradient(found_BD), spec("batch"))
