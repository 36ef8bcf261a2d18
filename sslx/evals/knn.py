"""Nearest neighbours of frozen features.

Q queries, N training examples, D features, K neighbours, C classes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sslx.config import Count, UserError
from sslx.evals import Evaluation, Subject


def make(*, k: Count = 5, chunk: Count = 1024) -> Evaluation:
    """knn/accuracy: the share of `test` whose class the k nearest of `train` by cosine elect.

    The most frequent class wins; among equals the one with the nearest neighbour (of equal
    neighbours, the first). Queries are compared `chunk` at a time.

    Raises UserError if `train` has fewer than k examples.
    """
    def evaluate(subject: Subject) -> dict[str, float]:
        (train_ND, train_N), (test_QD, test_Q) = subject.features("train"), subject.features("test")
        if len(train_N) < k:
            raise UserError(f"evals.knn.k is {k}, and evals.labelled.train has only {len(train_N)} examples")
        n_classes = int(train_N.max()) + 1
        keys_ND, classes_N = unit(jnp.asarray(train_ND)), jnp.asarray(train_N)
        queries = np.pad(test_QD, ((0, -len(test_QD) % chunk), (0, 0))).reshape(-1, chunk, test_QD.shape[1])
        elected = [elect(unit(jnp.asarray(q_QD)), keys_ND, classes_N, k=k, n_classes=n_classes) for q_QD in queries]
        return {"knn/accuracy": float(np.mean(np.concatenate(elected)[: len(test_Q)] == test_Q))}

    return Evaluation(evaluate, {"train": k, "test": 1})


@jax.jit(static_argnames=("k", "n_classes"))
def elect(queries_QD: jax.Array, keys_ND: jax.Array, classes_N: jax.Array, *, k: int, n_classes: int) -> jax.Array:
    """The class of each query, [Q], by majority of the k keys with the greatest inner products."""
    similarity_QN = jnp.matmul(queries_QD, keys_ND.T, precision="highest")
    nearest_QK = jax.lax.top_k(similarity_QN, k)[1]
    votes_QKC = jax.nn.one_hot(classes_N[nearest_QK], n_classes)
    # Below one vote, and greater the nearer the class's first neighbour.
    nearness_K = (k - jnp.arange(k)) / (k + 1)
    return jnp.argmax(votes_QKC.sum(1) + (votes_QKC * nearness_K[:, None]).max(1), -1)


def unit(x_ND: jax.Array) -> jax.Array:
    """Rows divided by their lengths; rows of zeros stay."""
    return x_ND / jnp.maximum(jnp.linalg.norm(x_ND, axis=-1, keepdims=True), 1e-12)
