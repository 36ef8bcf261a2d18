"""Assignments of crops to prototypes, and the prediction of one crop's from another.

B batch, K prototypes; V crops, the first G of which are the large ones.
"""

import jax
import jax.numpy as jnp


def sinkhorn(scores, temperature, iterations: int = 3, counted=True):
    """Q = diag(u) exp(scores / t) diag(v), [..., K], without a gradient: rows sum to 1, columns to about rows / K.

    Columns, over all rows of the global batch, and rows are normed in turn, rows last (Cuturi 2013). Rows that are not
    `counted`, which broadcasts, are assigned but have no part in the columns' sums.
    """
    rows = tuple(range(scores.ndim - 1))

    def normed(log_q, _):
        column_K = jax.nn.logsumexp(jnp.where(counted, log_q, -jnp.inf), rows)
        log_q = log_q - jnp.where(jnp.isfinite(column_K), column_K, 0)  # there may be no row that counts
        return log_q - jax.nn.logsumexp(log_q, -1, keepdims=True), None

    return jnp.exp(jax.lax.scan(normed, jax.lax.stop_gradient(scores) / temperature, None, length=iterations)[0])


def centred(logits_BK, centre_K, temperature):
    """softmax((logits - centre) / t), without a gradient."""
    return jax.lax.stop_gradient(jax.nn.softmax((logits_BK - centre_K) / temperature))


def swapped_prediction(logits_VBK, targets_GBK):
    """Mean over pairs (target g, crop v != g) and rows of the cross-entropy -sum_k q_gk log softmax(logits_v)_k.

    Sequences of [B, K].
    """
    log_p = [jax.nn.log_softmax(x_BK) for x_BK in logits_VBK]
    total_BK = sum(log_p)
    pairs = zip(log_p, targets_GBK, strict=False)
    loss = sum(-(q_BK * (total_BK - own_BK)).sum(-1).mean() for own_BK, q_BK in pairs)
    return loss / (len(targets_GBK) * (len(logits_VBK) - 1))
