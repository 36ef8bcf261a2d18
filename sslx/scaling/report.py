"""python -m sslx.scaling.report RUNS... -o page.html [--metric heldout/loss] [--n n_params|n_params_nonembedding]
       python -m sslx.scaling.report STUDY -o page.html

One self-contained page about finished runs: the law that they follow, as far as they do, with its figures, warnings and
predictions, and the runs; objectives beside each other by the metrics that they share. STUDY is a folder as
python -m sslx.scaling.study --help describes it, with its own law and predictions.
"""

import argparse
import datetime
import pathlib
import sys
from collections.abc import Iterable
from typing import NamedTuple

from sslx.command import told
from sslx.config import UserError
from sslx.report import Html, document, number, percent, scientific, section, table, tag
from sslx.scaling import fit, plots, study
from sslx.scaling.law import CONFIDENCE, Law
from sslx.scaling.points import Points, from_runs
from sslx.scaling.study import Logs, Study
from sslx.workdir import write_atomically


class Group(NamedTuple):
    """Runs that may share a law: what is known of them. refused: why there is no law."""

    title: str
    label: str
    logs: Logs
    points: Points | None
    law: Law | None
    refused: str | None = None
    predictions: list[dict[str, float]] = []  # noqa: RUF012
    measured: Points | None = None


def page(folders: Iterable[pathlib.Path], metric: str = "heldout/loss", count: str = "n_params") -> str:
    """The page about studies, or about the runs below folders. Raises UserError if there are none."""
    folders = list(folders)
    studies = [f for f in folders if (f / "study.json").exists()]
    groups = [of_study(study.read(f), study.logs([f / "runs"]) if (f / "runs").is_dir() else {})
              for f in studies]
    rest = [f for f in folders if f not in studies]
    if rest:
        groups += of_runs(rest, metric, count)
    title = groups[0].title if len(groups) == 1 else f"{len(groups)} objectives or data"
    written = datetime.datetime.now().astimezone().strftime("%-d %B %Y, %H:%M %Z")
    return document(f"Scaling: {title}", [
        tag("header", tag("h1", title), tag("p", written, class_="ids")),
        *(part for g in groups for part in about(g, len(groups) > 1, metric)),
        section("Objectives at equal FLOPs", comparisons(groups, rest, count))], STYLE)


def of_study(found: Study, logs: Logs) -> Group:
    law, refused = (found.law, None) if found.law else attempted(found.points)
    return Group(found.title, found.label, logs, found.points, law, refused, found.predictions, found.measured)


def of_runs(folders: list[pathlib.Path], metric: str, count: str) -> list[Group]:
    """A group for each objective and its data."""
    kinds: dict[str, list[pathlib.Path]] = {}
    for workdir in study.workdirs(folders):
        for run, _ in study.logs([workdir]).values():
            kinds.setdefault(f"{run['objective']} on {run['dataset']}", []).append(workdir)
    groups = []
    for title, workdirs in kinds.items():
        own = study.logs(workdirs)
        try:
            points = from_runs(workdirs, metric, count)
        except UserError as error:
            groups.append(Group(title, metric, own, None, None, str(error)))
            continue
        groups.append(Group(title, metric, own, points, *attempted(points)))
    return groups


def attempted(points: Points) -> tuple[Law | None, str | None]:
    """(law, None), or (None, why there is none)."""
    try:
        return fit.fit(points), None
    except UserError as error:
        return None, str(error)


# ---- the parts of a group


def about(g: Group, named: bool, metric: str) -> list[Html]:
    """What is known of a group, from top to bottom."""
    warnings = [*([f"No law: {g.refused}"] if g.refused else []), *(g.law.report["warnings"] if g.law else [])]
    return [tag("h2", g.title, class_="group") if named else Html(), facts(g),
            tag("ul", *(tag("li", w) for w in warnings), class_="notes") if warnings else Html(),
            law_table(g.law), section("Figures", figures(g)), prediction_table(g), run_table(g, metric)]


def facts(g: Group) -> Html:
    """Names and numbers of the runs."""
    if g.points is None:
        return Html()
    p = g.points
    span = lambda x: f"{scientific(x.min(), 3)} to {scientific(x.max(), 3)}"  # noqa: E731
    cells = {"points": str(len(p.loss)), "FLOPs": span(p.c), "parameters": span(p.n), "units seen": span(p.d),
             g.label: f"{number(p.loss.min())} to {number(p.loss.max())}"}
    return tag("dl", *(tag("div", tag("dt", k), tag("dd", v)) for k, v in cells.items()), class_="facts wide")


def law_table(law: Law | None) -> Html:
    """Parameters and exponents with their intervals."""
    if law is None:
        return Html()
    spans, exponents = law.report["intervals"], law.report["exponents"]
    rows = [[name, number(value), between(spans.get(name))] for name, value in law.params.items()]
    rows += [[f"best {what} ∝ C^{e}", number(exponents[e], 3), between(exponents.get("intervals", {}).get(e))]
             for what, e in (("N", "a"), ("D", "b")) if e in exponents]
    return tag("section", tag("h2", "Parameters"), tag("div", tag("p", law.shape.formula), table(
        ["", "value", f"{CONFIDENCE:.0%}"], rows, "Parameters of the law"), class_="card numbers"))


def between(span: list[float] | None) -> str:
    return "–" if span is None else f"{number(span[0], 3)} to {number(span[1], 3)}"


def figures(g: Group) -> list[Html]:
    """What the points and the law allow to draw."""
    found = []
    if g.points is not None and g.points.budget.max():
        found.append(figure(plots.isoflops(g.points, g.law, g.label), "Runs of equal compute: "
                            + ("lines are the law" if g.law else "there is no law")))
    if g.points is not None and g.law is not None:
        found.append(figure(plots.frontier(g.points, g.law, g.label, g.measured), "What compute buys"))
        if {"a", "b"} <= g.law.report["exponents"].keys():
            found.append(figure(plots.allocation(g.points, g.law), "What to spend it on"))
        found.append(figure(plots.residuals(g.points, g.law), "What the law misses: a trend would be its fault"))
        if g.law.report["backtest"]["folds"]:
            found.append(figure(plots.backtests(g.law), "Back-tests: earlier fits against later budgets"))
    if g.predictions and g.measured is not None:
        found.append(figure(plots.predictions(g.predictions, g.measured, g.label), "Predicted, then measured"))
    return found + ([figure(plots.training(g.logs), "The runs on their way")] if g.logs else [])


def prediction_table(g: Group) -> Html:
    if not g.predictions:
        return Html()
    found = [g.measured.loss[i] for _, i in plots.matched(g.predictions, g.measured)] if g.measured else []
    rows = [[number(p["n"]), number(p["d"]), number(p["loss"]), f"{number(p['lo'])} to {number(p['hi'])}",
             *([number(found[i]), percent(found[i] / p["loss"] - 1)] if found else ["–", "–"])]
            for i, p in enumerate(g.predictions)]
    columns = ["N", "D", "predicted", f"{CONFIDENCE:.0%}", "measured", "off by"]
    return tag("section", tag("h2", "Predictions"),
               tag("div", table(columns, rows, "Predictions"), class_="card numbers"))


def run_table(g: Group, metric: str) -> Html:
    """What each run ended with, beside what the law expects."""
    rows = []
    for r in study.ends(g.logs, g.points.metric if g.points else metric):
        over = r["value"] / float(g.law.loss(r["n"], r["d"])[0]) - 1 if g.law and r["value"] else None
        rows.append([r["run"], number(r["n"]), number(r["d"]), scientific(r["flops"]), number(r["epochs"], 3),
                     "–" if r["value"] is None else number(r["value"]), "–" if over is None else percent(over)])
    if not rows:
        return Html()
    columns = ["run", "N", "D", "FLOPs", "epochs", g.label, "over the law"]
    return tag("details", tag("summary", tag("h2", f"{len(rows)} runs")),
               tag("div", table(columns, rows, "Runs"), class_="card numbers"), open="")


def comparisons(groups: list[Group], folders: list[pathlib.Path], count: str) -> list[Html]:
    """A figure for each accuracy that the runs of several objectives have."""
    names = [{m for _, points in g.logs.values() for p in points if p["split"] == "eval" for m in p["metrics"]}
             for g in groups]
    if len(groups) < 2:
        return []
    shared = sorted(m for m in set.intersection(*names) if m.endswith("/accuracy"))
    of = {m: study.by_objective(folders, m, count) for m in shared}
    return [figure(plots.objectives(points, label=metric), metric) for metric, points in of.items()]


def figure(plot: plots.Plot, caption: str) -> Html:
    """A figure within the page, as wide as in print or as the page allows."""
    wide = plot.get_size_inches()[0] > plots.COLUMN
    return tag("figure", tag("figcaption", tag("h3", caption)), Html(plots.svg(plot)),
               class_="paper wide" if wide else "paper")


STYLE = """
.plots { grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); align-items: start; }
.paper { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.paper.wide { grid-column: 1 / -1; }
.paper svg { display: block; width: 100%; height: auto; max-width: 40rem; margin: auto; }
.paper.wide { overflow-x: auto; } .paper.wide svg { min-width: 34rem; max-width: 64rem; }
.facts.wide { grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }
.numbers table { width: 100%; } .numbers p { margin: 0 0 .5rem; }
.numbers :is(th, td):not(:first-child) { text-align: right; } .numbers :is(th, td):last-child { padding-right: 0; }
.group { font-size: 1.6rem; margin-top: 3.5rem; }
.notes li + li { margin-top: .3rem; }
@media (prefers-color-scheme: dark) { .paper svg { filter: invert(.9) hue-rotate(180deg); } }
@media print { .paper svg { filter: none; } }
"""


@told
def main(arguments: list[str]) -> int:
    """Writes the page. Returns 0, or 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m sslx.scaling.report", usage=__doc__)
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    parser.add_argument("-o", "--out", required=True, type=pathlib.Path)
    parser.add_argument("--metric", default="heldout/loss")
    parser.add_argument("--n", default="n_params", choices=("n_params", "n_params_nonembedding"))
    given = parser.parse_args(arguments)
    write_atomically(given.out, page(given.runs, given.metric, given.n))
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
