"""Copying in context: how much cheaper a text is to predict the second time."""

import jax
import numpy as np

from sslx.config import Count, UserError
from sslx.evals import Evaluation, Subject
from sslx.evals.heldout import full_batches, weighted_means


def make(*, batches: Count = 4) -> Evaluation:
    """`copying/gain`, in nats per token, over `batches` held-out batches: near 0 until a network copies.

    2 (loss of [y, x] - loss of [x, x]), x and y being the first halves of two windows: what it helps a causal model to
    have read the same before. Networks learn it all at once, by induction heads, and their loss falls below the
    scaling law of those that have not: a law holds on one side only. Olsson et al. 2022.

    Raises UserError for examples without tokens.
    """
    def evaluate(subject: Subject) -> dict[str, float]:
        if subject.loss is None:
            return {}
        again, other = [], []
        for number, batch in enumerate(full_batches(subject, batches)):
            if "tokens" not in batch:
                raise UserError("evals.copying is of text, and the examples of evals.heldout.source have no tokens:"
                                " remove it")
            x = batch["tokens"][:, :batch["tokens"].shape[1] // 2]
            again.append(subject.loss({"tokens": np.concatenate([x, x], 1)}, number))
            other.append(subject.loss({"tokens": np.concatenate([np.roll(x, 1, 0), x], 1)}, number))
        after_another, after_itself = (weighted_means(jax.device_get(x))["loss"] for x in (other, again))
        return {"copying/gain": 2 * (after_another - after_itself)}

    return Evaluation(evaluate, {"heldout": None})
