"""python -m sslx.scaling.fit RUNS... [--metric heldout/loss] [--n n_params_nonembedding]
       python -m sslx.scaling.fit --table F.csv|jsonl --n COL --d COL --loss COL [--c COL] [--unique COL] [--group COL]
                                  [--weights COL] [--where COL=VALUE,...]
       [--form auto|chinchilla|tied|overtraining|data-constrained|power] [--fix NAME=VALUE,...]
       [--predict N:D[:UNIQUE],...] [--json OUT]

Fits a scaling law to finished runs, or to the rows of a table, and says how far it can be trusted: intervals by
resampling whole runs and budgets, averaged over forms and widened by what the same method got wrong before.

--form     L = E + A/N^a + B/D^b (chinchilla); with one exponent (tied); and C (overtraining); with data that repeat
           (data-constrained, takes --unique); of compute alone (power; a metric that rises is M - A/C^a).
           auto takes the one of the first two whose back-tests are better.
--n --c    without --d and --loss: rows are optima, and N_opt = k C^a is fitted.
--group    rows with the same value are resampled together: runs, or points of one run.
--where    rows that are used; several values of one column are alternatives.
--fix      parameters that are known.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np

from sslx.command import Parser, told
from sslx.config import UserError, nearest
from sslx.scaling import approaches, checks, intervals
from sslx.scaling.forms import FORMS, RISING, Array, Form
from sslx.scaling.law import CONFIDENCE, Flops, Law, Member, quantiles
from sslx.scaling.points import Points, from_runs, from_table

AVERAGED = {"chinchilla": ("chinchilla", "tied"), "tied": ("tied", "chinchilla")}
SEED = 0
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
ALIKE = 1e-6  # relative difference of objectives of starts that agree


def fit(points: Points, form: str = "auto", fixed: dict[str, float] | None = None) -> Law:
    """The law of a form (`FORMS`, or "auto") that fits `points`. Raises UserError for points that carry none.

    fixed: parameters that are known.
    """
    fixed = fixed or {}
    draw = np.random.default_rng(SEED)
    names = ("chinchilla", "tied") if form == "auto" else AVERAGED.get(form, (form,)) if not fixed else (form,)
    forms: dict[str, Form] = {n: RISING if n == "power" and points.rising else FORMS[n] for n in names}
    first = "tied" if form == "auto" else form
    for name in fixed:
        if name not in forms[names[0]].parameters:
            raise UserError(f"--fix {name}: the form {names[0]!r} has no such parameter"
                            f"{nearest(name, forms[names[0]].parameters)}")
    free = len(forms[first].parameters) - len(fixed)
    checks.refuse(points, forms[first], first, free)
    forms = {n: f for n, f in forms.items() if len(f.parameters) - len(fixed) < len(points.loss)}
    fits = {n: intervals.fitted(f, points, fixed) for n, f in forms.items()}
    folds = {n: intervals.backtest(f, points, draw) for n, f in fits.items() if form == "auto" or n == form}
    form = min(folds, key=lambda n: score(folds[n], fits[n])) if form == "auto" else form
    best = fits[form]
    shares = intervals.shares(fits, len(points.loss))
    draws = {n: intervals.resampled(f, points, draw) for n, f in fits.items()}
    members = tuple(Member(n, shares[n], f.centre, draws[n]) for n, f in fits.items())
    params = best.form.named(best.form.moved(best.theta, best.centre))
    around = best.form.moved(draws[form], best.centre)
    low, high = (best.form.named(end) for end in quantiles(around, np.ones(len(around))))
    spans = {p: [low[p], high[p]] for p in params if p not in fixed}
    allocation, edges = approaches.diagnose(points) if "b" in best.form.exponents else ({}, [])
    warnings = [*checks.of_points(points, len(params) - len(fixed)), *edges,
                *checks.of_fit(best, params, points, fixed), *checks.of_intervals(best.form, spans, params),
                *checks.of_profiles(best, points),
                *checks.of_backtest(folds[form])]
    ends = best.ends
    report = dict(
        intervals=spans, objective=best.objective, n_points=len(points.loss),
        starts=dict(n=len(ends), agreeing=int((ends <= ends.min() * (1 + ALIKE) + 1e-18).sum()), best=float(ends.min()),
                    median=float(np.median(ends)), worst=float(ends.max())),
        exponents=exponents(form, params, around) | allocation,
        backtest=dict(folds=[f._asdict() for f in folds[form]], failed=bool(checks.of_backtest(folds[form]))),
        warnings=warnings)
    drift, misfit = intervals.widening(best, points, folds[form])
    fall, doubt = intervals.unbent(points) if "b" in best.form.exponents else (0.0, 0.0)
    return Law(form, params, members, drift, misfit, fall, doubt, float(points.c.max()), flops_of(points),
               points.counted, report)


def score(folds: list[intervals.Fold], fitted: intervals.Fitted) -> tuple[float, float]:
    """How wrong a form's back-tests were; without any, how well it fits."""
    return float(np.mean([abs(f.relative) for f in folds])) if folds else 0.0, fitted.objective


def exponents(form: str, params: dict[str, float], thetas: Array) -> dict[str, Any]:
    """{a, b} of N_opt ~ C^a and D_opt ~ C^b for C ~ N D, with intervals; {} of a form that knows no N and D."""
    if form == "optimum":
        low, high = (float(q) for q in np.quantile(thetas[:, 1], TAILS))
        return dict(a=params["a"], b=1 - params["a"], intervals=dict(a=[low, high], b=[1 - high, 1 - low]))
    if form in ("tied", "overtraining"):
        return dict(a=0.5, b=0.5)
    if form == "power":
        return {}
    a, b = params["a"], params["b"]
    low, high = (float(q) for q in np.quantile(thetas[:, 4] / (thetas[:, 3] + thetas[:, 4]), TAILS))
    return dict(a=b / (a + b), b=a / (a + b), intervals=dict(a=[low, high], b=[1 - high, 1 - low]))


def flops_of(points: Points) -> Flops:
    """k(N) of C = k N D at each size that was run, the median over its points."""
    ln_n, size = np.unique(np.log(points.n), return_inverse=True)
    ln_k = np.log(points.c / points.n / points.d)
    return Flops(ln_n, np.array([np.median(ln_k[size == i]) for i in range(len(ln_n))]))


def table(law: Law, predictions: list[dict[str, float]]) -> str:
    """The law for people."""
    report = law.report
    lines = [f"{law.shape.formula}, {report['n_points']} points, objective {report['objective']:.8g};"
             f" {report['starts']['agreeing']} of {report['starts']['n']} starts agree"]
    for name, value in law.params.items():
        low, high = report["intervals"].get(name, (value, value))
        lines.append(f"  {name:>4} {value:>12.5g}   90 %: {low:.5g} to {high:.5g}" if low < high else
                     f"  {name:>4} {value:>12.5g}   given")
    for name, e in (("the law", report["exponents"]), *((n, report["exponents"].get(n)) for n in
                                                        ("approach_1", "approach_2"))):
        if e:
            lines.append(f"  N_opt ~ C^{e['a']:.3f}, D_opt ~ C^{e['b']:.3f} by {name.replace('_', ' ')}")
    folds = report["backtest"]["folds"]
    if folds:
        lines.append("back-tests: fitted to smaller budgets, how far off at later ones")
        lines += [f"  {f['extrapolation']:>8.3g} x compute: {f['relative']:+.2%} of the loss" for f in folds]
    lines += [f"  N {p['n']:.4g}  D {p['d']:.4g}: {p['loss']:.4f}   90 %: {p['lo']:.4f} to {p['hi']:.4f}"
              for p in predictions]
    return "\n".join(lines + [f"warning: {w}" for w in report["warnings"]])


def pairs(text: str, flag: str) -> list[tuple[str, str]]:
    """[(name, value)] of NAME=VALUE,..."""
    found = [part.partition("=") for part in text.split(",") if part]
    if not all(name and equal for name, equal, _ in found):
        raise UserError(f"{flag} {text}: it takes NAME=VALUE,...")
    return [(name, value) for name, _, value in found]


def numbers(text: str, flag: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(":")]
    except ValueError:
        found = []
    if not found or not all(0 < x < np.inf for x in found):
        raise UserError(f"{flag} {text}: it takes positive numbers")
    return found


def read(given: argparse.Namespace) -> tuple[Points, str]:
    """(points, form) of the command line."""
    if (given.table is None) == (not given.runs):
        raise UserError(f"the command takes folders of runs, or --table, and one of both.\n{__doc__}")
    if given.runs:
        return from_runs(given.runs, given.metric, given.n or "n_params"), given.form
    columns = dict(n=given.n, d=given.d, c=given.c, loss=given.loss, unique=given.unique, weight=given.weights)
    if given.n and given.c and not given.loss and given.form in ("auto", "optimum"):
        given.form = "optimum"
        columns |= dict(n=None, loss=given.n)
    needed = ("c", "loss") if given.form in ("power", "optimum") else ("n", "d", "loss")
    if given.form == "power" and not given.c:
        needed = ("n", "d", "loss")
    for role in needed:
        if not columns[role]:
            raise UserError(f"--{role} is missing: the column of --table that holds {role}")
    if given.form == "data-constrained" and not given.unique:
        raise UserError("--unique is missing: the form data-constrained takes the column of units that are unique")
    return from_table(given.table, columns, given.group, pairs(given.where, "--where")), given.form


@told
def main(arguments: list[str]) -> int:
    """Reads points, fits, prints, writes. Returns 0, or 2 for a mistake."""
    parser = Parser(prog="python -m sslx.scaling.fit", usage=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=pathlib.Path)
    parser.add_argument("--table", type=pathlib.Path)
    for column in ("n", "d", "c", "loss", "unique", "group", "weights"):
        parser.add_argument(f"--{column}")
    parser.add_argument("--where", default="")
    parser.add_argument("--metric", default="heldout/loss")
    parser.add_argument("--form", default="auto", choices=("auto", *FORMS))
    parser.add_argument("--fix", default="")
    parser.add_argument("--predict", default="")
    parser.add_argument("--json", type=pathlib.Path)
    given = parser.parse_args(arguments)
    wanted = [tuple(numbers(part, "--predict")) for part in given.predict.split(",") if part]
    if not all(2 <= len(w) <= 3 for w in wanted):
        raise UserError(f"--predict {given.predict}: it takes N:D or N:D:UNIQUE, several with commas")
    fixed = {name: numbers(value, f"--fix {name}")[0] for name, value in pairs(given.fix, "--fix")}
    points, form = read(given)
    law = fit(points, form, fixed)
    predictions = law.predictions(wanted)
    if given.json:
        given.json.write_text(json.dumps(law.as_json(predictions), indent=1) + "\n")
    print(table(law, predictions))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
