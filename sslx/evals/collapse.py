"""Signs of collapse: features that use few directions, or one point. N examples, D features."""

from typing import Annotated, Literal

import numpy as np

from sslx.config import LARGEST_INT, Only, Positive
from sslx.evals import Evaluation, Subject

Rows = Annotated[int, Only(lambda n: 2 <= n <= LARGEST_INT, "an integer of at least 2")]


def make(*, split: Literal["train", "test", "heldout"] = "test", rows: Rows = 25600, min_rankme: Positive = 3.0,
         min_feature_std: Positive = 0.1, of: Literal["features", "projections"] = "features") -> Evaluation:
    """`rankme` and `feature_std` of the features of a split's first `rows` examples; labels are not needed.

    `collapsed` is 1 if one of them is below its minimum, and else 0 (see run.on_collapse).
    of: "projections" are what a joint embedding compares. They collapse first: features before them hold out longer.
    """
    def evaluate(subject: Subject) -> dict[str, float]:
        features_ND, _ = subject.features(split, rows, of)
        rank, std = rankme(features_ND), feature_std(features_ND)
        return {"rankme": rank, "feature_std": std, "collapsed": float(rank < min_rankme or std < min_feature_std)}

    return Evaluation(evaluate, {split: 2}, {"features": (), "projections": ("project",)}[of])


def rankme(features_ND: np.ndarray, eps: float = 1e-7) -> float:
    """exp(-sum_i p_i ln p_i), p_i = sigma_i / sum_j sigma_j + eps over singular values: 1 (collapsed) to min(N, D).

    The singular values are the roots of the eigenvalues of the smaller Gram matrix, in float64.
    Garrido et al. 2023.
    """
    x = features_ND.astype(np.float64)
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    sigma = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    p = sigma / max(sigma.sum(), np.finfo(np.float64).tiny) + eps
    return float(np.exp(-(p * np.log(p)).sum()))


def feature_std(features_ND: np.ndarray) -> float:
    """sqrt(D) times the mean over dimensions of the deviation of unit features: 0 (collapsed) to 1 (spread).

    Chen and He 2021.
    """
    lengths_N1 = np.linalg.norm(features_ND, axis=1, keepdims=True)
    unit_ND = features_ND / np.maximum(lengths_N1, 1e-12)
    return float(np.sqrt(features_ND.shape[1]) * unit_ND.std(0).mean())
