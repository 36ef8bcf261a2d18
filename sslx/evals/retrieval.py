"""Retrieval: captions by images and images by captions."""

import numpy as np

from sslx.config import Count
from sslx.evals import Evaluation, Subject


def make(*, k: tuple[Count, ...] = (1, 10), rows: Count = 5000) -> Evaluation:
    """`retrieval/text_at_k`, `retrieval/image_at_k`: the share of those whose other side is among the k nearest.

    Of the first `rows` pairs of evals.retrieval.source, by cosine; what is as near as one's own counts as found. Chance
    is `retrieval/chance_at_k` = k / N.
    """
    def evaluate(subject: Subject) -> dict[str, float]:
        pairs = subject.embeddings("retrieval", rows)
        cosines_NN = pairs["image"] @ pairs["text"].T
        own_N = np.diagonal(cosines_NN)
        nearer = {"text": (cosines_NN > own_N[:, None]).sum(1), "image": (cosines_NN > own_N).sum(0)}
        found = {f"retrieval/{name}_at_{n}": float((nearer_N < n).mean())
                 for name, nearer_N in nearer.items() for n in k}
        return found | {f"retrieval/chance_at_{n}": min(1.0, n / len(own_N)) for n in k}

    return Evaluation(evaluate, {"retrieval": max(k)}, pairs=True)
