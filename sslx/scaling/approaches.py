"""Approaches 1 and 2 of Hoffmann et al. 2022, as diagnostics of the fit of a law (approach 3).

1: the envelope of all runs, N and D of the least loss at each budget. 2: the minimum of a parabola in ln N through the
points of each budget.
"""

from typing import Any, NamedTuple

import numpy as np

from sslx.scaling.forms import Array
from sslx.scaling.points import Points

NEAR = 5   # points around the least loss of a budget that a parabola goes through
LEAST = 3  # points of a budget through which a parabola says something


class Optima(NamedTuple):
    """ln_c, ln_n, ln_d, loss: float[K], of the optimum at each budget. edge: how many have theirs not inside."""

    ln_c: Array
    ln_n: Array
    ln_d: Array
    loss: Array
    edge: int

    def exponents(self) -> dict[str, float] | None:
        """{a, b} of N ~ C^a, D ~ C^b by least squares; None of fewer than two budgets."""
        if len(self.ln_c) < 2:
            return None
        return dict(a=float(np.polyfit(self.ln_c, self.ln_n, 1)[0]), b=float(np.polyfit(self.ln_c, self.ln_d, 1)[0]))


def envelope(points: Points) -> Optima:
    """Approach 1."""
    x, budget = points.inputs, points.budget
    best = np.array([rows[points.loss[rows].argmin()] for rows in
                     (np.flatnonzero(budget == k) for k in range(budget.max() + 1))])
    edge = sum(points.n[i] in (points.n[budget == k].min(), points.n[budget == k].max()) for k, i in enumerate(best))
    return Optima(x.c[best], x.n[best], x.d[best], points.loss[best], edge)


def parabolas(points: Points) -> Optima:
    """Approach 2: through ln L over ln N, near the least loss of each budget."""
    x, budget = points.inputs, points.budget
    found, edge = [], 0
    for k in range(budget.max() + 1):
        rows = np.flatnonzero(budget == k)
        least = x.n[rows][points.loss[rows].argmin()]
        rows = rows[np.argsort(np.abs(x.n[rows] - least), kind="stable")][:NEAR]  # farther away it is no parabola
        if len(np.unique(x.n[rows])) < LEAST:
            continue
        centre = x.n[rows].mean()
        curve, slope, level = np.polyfit(x.n[rows] - centre, np.log(points.loss[rows]), 2)
        at = -slope / (2 * curve) if curve > 0 else np.inf
        if not x.n[rows].min() - centre < at < x.n[rows].max() - centre:
            edge += 1
            continue
        d_of_n = np.polyfit(x.n[rows] - centre, x.d[rows], 1)
        found.append((x.c[rows].mean(), centre + at, np.polyval(d_of_n, at), np.exp(level - slope**2 / (4 * curve))))
    ln_c, ln_n, ln_d, loss = np.array(found).reshape(-1, 4).T
    return Optima(ln_c, ln_n, ln_d, loss, edge)


def diagnose(points: Points) -> tuple[dict[str, Any], list[str]]:
    """({approach_1: {a, b}, approach_2: {a, b}}, warnings)."""
    one, two = envelope(points), parabolas(points)
    exponents = {"approach_1": one.exponents(), "approach_2": two.exponents()}
    warnings = []
    if two.edge:
        warnings.append(f"at {two.edge} of {len(two.ln_c) + two.edge} budgets the best size is at the edge of those"
                        " that were tried: add smaller or larger ones there")
    return {name: e for name, e in exponents.items() if e}, warnings
