"""The objective's own loss on held-out examples."""

import math
from collections.abc import Iterator

import jax
import numpy as np

from sslx import evals
from sslx.config import Count, UserError
from sslx.data import pipeline
from sslx.evals import Evaluation, HostBatch, Subject


def make(*, batches: Count = 16) -> Evaluation:
    """Means of the objective's metrics over the first `batches` full batches of evals.heldout.source.

    heldout/m = sum_i tokens_i m_i / sum_i tokens_i, with the key of batch i fixed, so that two
    checkpoints are corrupted alike. A metric `token_nll` (nats per token) on a source that knows
    its bytes per token also gives heldout/bits_per_byte = token_nll / ln 2 / bytes_per_token.

    Only full batches count, since a loss may compare the rows of its batch. Raises UserError if
    there is none.
    """
    def evaluate(subject: Subject) -> dict[str, float]:
        if subject.loss is None:
            return {}
        per_batch = jax.device_get([
            subject.loss(batch, number) for number, batch in enumerate(full_batches(subject, batches))
        ])
        metrics = weighted_means(per_batch)
        bytes_per_token = subject.split("heldout").info.bytes_per_token
        if "token_nll" in metrics and bytes_per_token:
            metrics["bits_per_byte"] = metrics["token_nll"] / math.log(2) / bytes_per_token
        return {f"heldout/{name}": value for name, value in metrics.items()}

    return Evaluation(evaluate, {"heldout": None})


def full_batches(subject: Subject, limit: int) -> Iterator[HostBatch]:
    """The inputs of the first `limit` batches that need no filling."""
    source, batch_size = subject.split("heldout"), subject.batch_size
    n = len(source.examples)
    if n < batch_size:
        raise UserError(f"the held-out source {source.info.name} has {n} examples, fewer than one batch of"
                        f" evals.batch_size={batch_size}; lower evals.batch_size or give it more examples")
    for batch, _ in evals.batches(source, batch_size, subject.on_bad, min(limit, n // batch_size) * batch_size):
        if "index" in subject.reads:  # a place in the training data, where these are not
            batch["index"] = np.full_like(batch["index"], -1)
        yield pipeline.inputs(batch, subject.reads)


def weighted_means(per_batch: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """The mean of each metric, weighted by `tokens`; `tokens` itself is left out."""
    weights = np.array([m["tokens"] for m in per_batch], np.float64)
    names = [name for name in per_batch[0] if name != "tokens"]
    return {name: float(np.average([m[name] for m in per_batch], weights=weights)) for name in names}
