"""What a fit refuses, and what it warns of: a number that the points do not carry is worse than none."""

import numpy as np

from sslx.config import UserError
from sslx.scaling import solve
from sslx.scaling.forms import Form
from sslx.scaling.intervals import Fitted, Fold
from sslx.scaling.points import Points

SANE = (0.15, 0.8)      # exponents of published laws
VANISHED = 1e-3         # an E below this share of the smallest loss is at its bound
UNIDENTIFIED = 8.0      # how far apart the ends of an interval may be, as a factor; of an exponent .5
FAILED = 3.0            # standard deviations by which a back-test is off, and
OFF = 0.02              # of the loss
FLAT = 2e-3             # spread of losses that is none
FLAT_WARNING = 0.05
PROFILED, FLAT_PROFILE = 3.0, 0.1  # a factor off in a parameter, by which the objective must grow by more


def refuse(points: Points, form: Form, name: str, free: int) -> None:
    """Raises UserError for points from which no law of this form can come."""
    p = len(points.loss)
    if p <= free:
        raise UserError(f"{p} points for {free} parameters of {name!r}: a law needs at least {free + 1}, and"
                        " several more to say anything about its error")
    spread = points.loss.max() / points.loss.min() - 1
    if spread < FLAT:
        raise UserError(f"{points.metric!r} is constant: all {p} values lie within {spread:.2%} of each other, and"
                        " there is nothing to fit")
    if points.budget.max() == 0:
        raise UserError(f"all {p} points have about the same compute, {points.c.min():.3g} to {points.c.max():.3g}"
                        " FLOPs: a law needs several budgets, at least 3 and better 5, over a factor of 30 and more")
    for column, what in ((points.n, "N"), (points.d, "D")):
        if len(form.signs) == 3 and len(np.unique(column)) < 3:
            raise UserError(f"there are only {len(np.unique(column))} different values of {what}: how the loss depends"
                            f" it cannot be known. Add runs, or take --form power")
    lines = np.log([points.n, points.d]) - np.log([points.n, points.d]).mean(-1, keepdims=True)
    if len(form.signs) == 3 and np.linalg.matrix_rank(lines, tol=1e-3 * np.linalg.norm(lines)) < 2:
        raise UserError("N and D lie on one line: all points have D as the same power of N, so that what is owed to"
                        " size and what to data cannot be told apart. Add points off that line, or take --form power")


def of_points(points: Points, free: int) -> list[str]:
    """Warnings about the points."""
    found = list(points.warnings)
    budgets = points.budget.max() + 1
    if len(points.loss) < 2 * free:
        found.append(f"{len(points.loss)} points for {free} parameters: the fit follows the noise")
    if budgets < 4:
        found.append(f"only {budgets} budgets: a bend of the law cannot be seen, and back-tests are few")
    if points.c.max() / points.c.min() < 30:
        found.append(f"the budgets span a factor of {points.c.max() / points.c.min():.3g} in compute; 30 and more"
                     " determine exponents")
    if points.loss.max() / points.loss.min() - 1 < FLAT_WARNING:
        found.append(f"{points.metric!r} changes by only {points.loss.max() / points.loss.min() - 1:.1%} in all points")
    return found


def of_fit(fit: Fitted, params: dict[str, float], points: Points, fixed: dict[str, float]) -> list[str]:
    """Warnings about the parameters at the minimum."""
    found = []
    if "E" in params and "E" not in fixed and params["E"] < VANISHED * points.loss.min():
        found.append("E is at its bound, 0: the points do not show where the loss levels off")
    if "E" in params and params["E"] > 0.98 * points.loss.min():
        found.append("E is as large as the smallest loss: the largest runs look like the end of the law")
    names = fit.form.parameters
    for j, name in enumerate(names):
        at_bound = min(fit.theta[j] - fit.bounds.low[j], fit.bounds.high[j] - fit.theta[j]) < 1e-6
        if name in fixed:
            continue
        if at_bound and name != "E":
            found.append(f"{name} is at the bound of what was searched: it is not identified")
        if name in fit.form.exponents and not SANE[0] <= (params[name] * (2 if name == "eta" else 1)) <= SANE[1]:
            found.append(f"the exponent {name} = {params[name]:.3g} is outside {SANE[0]} to {SANE[1]}, where those of"
                         " published laws lie: the points may not be in the regime of the law")
    return found


def of_intervals(form: Form, intervals: dict[str, list[float]], params: dict[str, float]) -> list[str]:
    """Warnings about parameters that could be anything."""
    found = []
    for name, (low, high) in intervals.items():
        wide = high - low > 0.5 if name in form.exponents else high > UNIDENTIFIED**2 * low if name in "AB" else (
            high > UNIDENTIFIED * max(low, 1e-9))
        if wide:
            found.append(f"{name} is not identified: {low:.3g} to {high:.3g} fit about as well as {params[name]:.3g}")
    return found


def of_profiles(fit: Fitted, points: Points) -> list[str]:
    """Warnings about parameters with a flat profile: elsewhere, and all others fitted anew, they fit about as well.

    Asked of what is neither an amplitude nor an exponent: how fast repeated data and excess parameters lose worth.
    """
    found = []
    for j in range(len(fit.form.signs) + len(fit.form.exponents), len(fit.theta)):
        for to in (np.log(PROFILED), -np.log(PROFILED)):
            elsewhere = fit.theta[j] + to
            if fit.bounds.low[j] == fit.bounds.high[j] or not fit.bounds.low[j] < elsewhere < fit.bounds.high[j]:
                continue
            low, high = fit.bounds.low.copy(), fit.bounds.high.copy()
            low[j] = high[j] = elsewhere
            _, objective = solve.minimize(fit.form, points.inputs.within(fit.centre), points.loss, points.weight,
                                          fit.theta[None], solve.Box(low, high))
            if objective[0] < (1 + FLAT_PROFILE) * fit.objective:
                more = objective[0] / fit.objective - 1
                found.append(f"{fit.form.parameters[j]} is not identified: with {np.exp(elsewhere):.3g} instead of"
                             f" {np.exp(fit.theta[j]):.3g} the objective is only {more:.1%} larger")
                break
    return found


def of_backtest(folds: list[Fold]) -> list[str]:
    """Warnings about earlier extrapolations."""
    if not folds:
        return ["no back-test: there are too few budgets or points to leave the largest out; the intervals know only"
                " noise"]
    failed = [f for f in folds if abs(f.error) > FAILED * f.noise and abs(f.relative) > OFF]
    if not failed:
        return []
    worst = max(failed, key=lambda f: abs(f.relative))
    return [f"{len(failed)} of {len(folds)} back-tests failed: fitted to smaller budgets, the law misses the loss at"
            f" {worst.extrapolation:.3g} x their compute by {worst.relative:+.1%}; intervals are widened by it"]
