"""How far a law can be trusted: resampled fits, and back-tests that ask what the same method would have said before.

Resampling sees noise. That a form is wrong it cannot see; earlier extrapolations, whose end is known, can.
"""

from typing import NamedTuple

import numpy as np

from sslx.config import UserError
from sslx.scaling import solve
from sslx.scaling.forms import Array, Form, Inputs
from sslx.scaling.points import Points

RESAMPLES, OF_A_FOLD = 200, 40
# These are chosen so that intervals cover what they should in synthetic studies (tests/scaling/test_coverage.py).
RUN_SHAPE, BUDGET_SHAPE = 4 / 3, 25.0  # of the Gamma laws of weights of runs and budgets: the variances are 1/shape
SURE, DRIFT = 1.4, 10.0  # standard deviations that are noise; how much more of a bend comes than back-tests have seen
ODD, MISFIT = 1.1, 2.2   # the same for the mean residual of a budget, or of one of
SIZES = 6                # classes of N, each with as many points
MOST_CUTS = 6
SURE_DECADES = 2.0       # of compute, in which a floor shows
HALF = 0.1  # by how much of ln C half of the decades may be missed


class Fitted(NamedTuple):
    """A form fitted to points: theta[J] at the minimum, in units of `centre`; objective; where the starts ended."""

    form: Form
    centre: Inputs
    bounds: solve.Box
    theta: Array
    objective: float
    ends: Array


class Fold(NamedTuple):
    """A back-test: fitted up to a budget, compared with one beyond it.

    extrapolation: C of the later budget / C of the last one in the fit.
    error:  mean over the later budget's points of (predicted - measured loss) / (loss - E).
    noise:  its standard deviation by resampling.
    """

    extrapolation: float
    error: float
    noise: float
    relative: float


def fitted(form: Form, points: Points, fixed: dict[str, float], n_starts: int = 36) -> Fitted:
    """The best of many starts, from a grid."""
    inputs = points.inputs
    centre = Inputs(*(np.array(x.mean()) for x in inputs))
    centre = centre._replace(u=centre.d)
    x = inputs.within(centre)
    bounds = solve.box(form, points.loss, centred(form, fixed, centre))
    begin = solve.starts(form, x, points.loss, points.weight, bounds, n_starts)
    thetas, values = solve.minimize(form, x, points.loss, points.weight, begin, bounds)
    best = int(values.argmin())
    return Fitted(form, centre, bounds, thetas[best], float(values[best]), values)


def centred(form: Form, fixed: dict[str, float], centre: Inputs) -> dict[str, float]:
    """Fixed values in units of `centre`: what is known of an amplitude depends on the exponents beside it.

    Raises UserError for an amplitude that is given without them.
    """
    known, moved = form.internal(dict.fromkeys(form.parameters, 1.0) | fixed), dict(fixed)
    k = len(form.signs)
    at_centre = form.slopes(Inputs(*(np.atleast_1d(x) for x in centre)))[:, 0]
    for j, name in enumerate(form.parameters[:k]):
        if name in fixed:
            beside = [e for e, slope in zip(form.exponents, at_centre[j], strict=True) if slope and e not in fixed]
            if beside:
                raise UserError(f"--fix {name} needs {', '.join(beside)} to be fixed as well")
            moved[name] = float(np.exp(known[j] + at_centre[j] @ known[k:k + len(form.exponents)]))
    return moved


def shares(fits: dict[str, Fitted], points: int) -> dict[str, float]:
    """{form: share} of an average, by Akaike's criterion for errors of Laplace's law of unknown scale."""
    criteria = {name: 2 * points * np.log(max(f.objective, 1e-300)) + 2 * len(f.theta) for name, f in fits.items()}
    least = min(criteria.values())
    weights = {name: float(np.exp(-0.5 * (c - least))) for name, c in criteria.items()}
    return {name: w / sum(weights.values()) for name, w in weights.items()}


def widening(fit: Fitted, points: Points, folds: list[Fold]) -> tuple[float, float]:
    """(drift, misfit): see `law.Law`. What noise explains does not count."""
    drift = max((max(0.0, abs(f.error) - SURE * f.noise) / np.log(f.extrapolation) for f in folds), default=0.0)
    residual = np.log(points.loss) - fit.form.log_loss(fit.theta, points.inputs.within(fit.centre))
    sizes = np.searchsorted(np.quantile(points.n, np.arange(1, SIZES) / SIZES), points.n)
    groups = [residual[of == k] for of in (points.budget, sizes) for k in np.unique(of)]
    misfit = max((abs(r.mean()) - ODD * r.std() / np.sqrt(len(r) - 1) for r in groups if len(r) > 2), default=0.0)
    return DRIFT * drift, MISFIT * max(0.0, misfit)


def unbent(points: Points) -> tuple[float, float]:
    """(fall, doubt): see `law.Law`.

    In the isoFLOP tables of Porian et al. 2024 intervals of laws of windows of a factor of 8 in compute hold 60 % of
    the best losses at 8 times more without this, 80 % with it; most were below.
    """
    budget = points.budget
    each = [budget == k for k in range(budget.max() + 1)]
    c, best = np.array([(points.c[rows].mean(), points.loss[rows].min()) for rows in each]).T
    if len(c) < 2:
        return 0.0, 0.0
    fall = -float(np.polyfit(np.log(c), np.log(best), 1)[0])
    decades = np.log10(c.max() / c.min())
    return max(fall, 0.0), float(np.clip(SURE_DECADES - decades, 0.0, 1.0))


def resample_weights(points: Points, n: int, draw: np.random.Generator) -> Array:
    """float[n, P], mean 1: random weights of whole runs times random weights of whole budgets."""
    budget = points.budget
    runs, run = np.unique(points.run, return_inverse=True)
    of_runs = draw.gamma(RUN_SHAPE, 1 / RUN_SHAPE, size=(n, len(runs)))
    of_budgets = draw.gamma(BUDGET_SHAPE, 1 / BUDGET_SHAPE, size=(n, budget.max() + 1))
    return of_runs[:, run] * of_budgets[:, budget]


def resampled(fit: Fitted, points: Points, draw: np.random.Generator, n: int = RESAMPLES) -> Array:
    """theta[n, J] of resamples, their distance from the fit widened for the parameters that it took from the points."""
    weights = resample_weights(points, n, draw) * points.weight
    begin = np.repeat(fit.theta[None], n, 0)
    thetas, _ = solve.minimize(fit.form, points.inputs.within(fit.centre), points.loss, weights, begin, fit.bounds,
                               steps=60, tolerance=1e-6)
    return thetas


def backtest(fit: Fitted, points: Points, draw: np.random.Generator, n: int = OF_A_FOLD) -> list[Fold]:
    """What fits to the lower budgets, over at least half of all decades of compute, said of each later one."""
    budget, x = points.budget, points.inputs.within(fit.centre)
    free = int((fit.bounds.low < fit.bounds.high).sum())
    cuts = [k for k in range(1, budget.max()) if (budget <= k).sum() >= free + 2
            and x.c[budget == k].mean() >= (x.c.min() + x.c.max()) / 2 - HALF]
    cuts = cuts[::-(-len(cuts) // MOST_CUTS)] if cuts else []
    predicted_all = np.exp(fit.form.log_loss(fit.theta, x))
    floor = np.exp(fit.theta[0])
    excess = np.abs(predicted_all - floor)
    folds = []
    for cut in cuts:
        seen = points.take(budget <= cut)
        begin = solve.starts(fit.form, seen.inputs.within(fit.centre), seen.loss, seen.weight, fit.bounds, 8)
        ends, values = solve.minimize(fit.form, seen.inputs.within(fit.centre), seen.loss, seen.weight, begin,
                                      fit.bounds, steps=80, tolerance=1e-9)
        theta = ends[values.argmin()]
        weights = resample_weights(seen, n, draw) * seen.weight
        thetas, _ = solve.minimize(fit.form, seen.inputs.within(fit.centre), seen.loss, weights,
                                   np.repeat(theta[None], n, 0), fit.bounds, steps=40, tolerance=1e-5)
        said = np.exp(fit.form.log_loss(np.concatenate([theta[None], thetas]), x))
        for later in range(cut + 1, budget.max() + 1):
            rows = budget == later
            errors = ((said[:, rows] - points.loss[rows]) / excess[rows]).mean(-1)
            away = np.exp(np.log(points.c[rows]).mean() - np.log(seen.c[seen.budget == cut]).mean())
            relative = (said[0, rows] / points.loss[rows] - 1).mean()
            folds.append(Fold(float(away), float(errors[0]), float(errors[1:].std()), float(relative)))
    return folds
