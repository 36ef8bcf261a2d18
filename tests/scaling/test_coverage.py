"""Intervals hold what they promise, over synthetic studies whose truth is known (synthetic_studies.py)."""

import numpy as np
import pytest
from synthetic_studies import study

from sslx.scaling.fit import fit

FACTORS = (1, 10, 100)  # of the largest budget in the fit


def covered(kind: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(share of studies whose interval holds the true loss of the best run at each of FACTORS, the same of params)."""
    losses, params = [], []
    for seed in range(n):
        made = study(seed, kind)
        law = fit(made.points, "chinchilla")
        sizes, data = np.array([made.best(made.points.c.max() * k) for k in FACTORS]).T
        low, high = law.interval(sizes, data)
        losses.append((low <= made.loss(sizes, data)) & (made.loss(sizes, data) <= high))
        spans = law.report["intervals"] | {"n ~ c": law.report["exponents"]["intervals"]["a"]}
        truth = made.params | {"n ~ c": made.params["b"] / (made.params["a"] + made.params["b"])}
        params.append([low <= truth[name] <= high for name, (low, high) in spans.items()])
    return np.mean(losses, 0), np.mean(params, 0)


@pytest.mark.slow
def test_coverage_of_the_law():
    losses, params = covered("law", 200)
    assert (0.85 <= losses).all() and (losses <= 0.95).all(), losses
    assert (0.85 <= params).all() and (params <= 0.95).all(), params


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kink", "drift"])
def test_coverage_of_what_is_no_law(kind):
    losses, _ = covered(kind, 200)
    assert (losses >= 0.8).all(), losses


@pytest.mark.parametrize("kind, least", [("law", 0.8), ("kink", 0.7), ("drift", 0.7)])
def test_coverage_in_small(kind, least):
    losses, params = covered(kind, 24)
    assert (losses >= least).all(), losses
    assert kind != "law" or (params >= least).all(), params


def test_a_kink_is_seen():
    """What resampling knows is noise; back-tests know that the law is wrong, and say so."""
    plain, kinked = ([fit(study(seed, kind).points, "chinchilla") for seed in range(8)] for kind in ("law", "kink"))
    assert np.median([law.drift for law in kinked]) > 5 * np.median([law.drift for law in plain])
    assert sum(any("back-tests failed" in w for w in law.report["warnings"]) for law in kinked) >= 4
    assert not any("back-tests failed" in w for law in plain for w in law.report["warnings"])
