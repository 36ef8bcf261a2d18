"""Retrieval: captions by images and images by captions."""

import numpy as np

from sslx.config import Count
from sslx.evals import Evaluation, Subject


def make(*, k: tuple[Count, ...] = (1, 10), rows: Count = 5000) -> Evaluation:
    """`retrieval/text_at_k`, `retrieval/image_at_k`: the share of those whose other side is among the k nearest.

    Of the first `rows` pairs of evals.retrieval.source, by cosine. Of others as near as one's own, such as those of the
    same caption, half come before it. Chance is `retrieval/chance_at_k` = k / N.
    """
    def before(cosines_NN, own_N):
        """How many candidates of each row come before its own; all, if they do not compare."""
        farther, as_near = cosines_NN < own_N[:, None], cosines_NN == own_N[:, None]
        return (~farther & ~as_near).sum(1) + (as_near.sum(1) - 1) / 2

    def evaluate(subject: Subject) -> dict[str, float]:
        pairs = subject.embeddings("retrieval", rows)
        cosines_NN = pairs["image"] @ pairs["text"].T
        own_N = np.diagonal(cosines_NN)
        ahead = {"text": before(cosines_NN, own_N), "image": before(cosines_NN.T, own_N)}
        found = {f"retrieval/{name}_at_{n}": float((ahead_N < n).mean())
                 for name, ahead_N in ahead.items() for n in k}
        return found | {f"retrieval/chance_at_{n}": min(1.0, n / len(own_N)) for n in k}

    return Evaluation(evaluate, {"retrieval": max(k)}, ("embed",))
