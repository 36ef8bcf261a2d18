"""python -m sslx.scaling.scores RUNS... [--metrics knn/accuracy,probe/accuracy,rankme] [--minutes 4,8,20]

Evaluations of the runs below some folders as a table in Markdown, with those of random weights: accuracies in per cent,
examples seen, CPU-minutes. A column is the last evaluation within so many CPU-minutes (cpu_s of the log; a twentieth
more counts); by default the last of all. Runs whose names differ in their seed alone, as in byol_s0 and byol_s1, are
one row of means.
"""

import argparse
import pathlib
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence

from sslx.command import told
from sslx.config import UserError
from sslx.log import Record
from sslx.report import number
from sslx.scaling.grid import numbers
from sslx.scaling.study import logs

LATER = 0.05  # than the minutes that are asked for
PERCENT = re.compile(r"accuracy$|_at_\d+$")


def rows(found: dict[str, tuple[Record, list[Record]]], metrics: Sequence[str],
         minutes: Sequence[float]) -> list[list[str]]:
    """A row for all seeds of a run: name, FLOPs of an example, scores at the start and at each of `minutes`."""
    seeds: dict[str, list[tuple[Record, list[Record]]]] = defaultdict(list)
    for name, (run, points) in found.items():
        seeds[re.sub(r"_s\d+$", "", name)].append((run, [p for p in points if p["split"] == "eval"]))
    table = []
    for name, of_seeds in sorted(seeds.items()):
        flops = statistics.fmean(sum(run["flops_per_example"].values()) for run, _ in of_seeds)
        start = [points[0] for _, points in of_seeds if points and points[0]["step"] == 0]
        after = [[p for p in points if p["step"]] for _, points in of_seeds]
        if not all(after):
            raise UserError(f"{name} has no evaluation after its first step: it has nothing to compare")
        columns = [within(after, 60 * m) for m in minutes] or [[p[-1] for p in after]]
        cells = [scores(start, metrics, "@random_init"),
                 *(f"{scores(points, metrics)} ({seen(points)})" if points else "-" for points in columns)]
        table.append([f"{name}, {len(of_seeds)} seeds" if len(of_seeds) > 1 else name, number(flops, 3), *cells])
    return table


def within(after: Sequence[Sequence[Record]], cpu_s: float) -> list[Record]:
    """Of each seed the last evaluation within so many CPU-seconds; none unless each has one."""
    points = [[p for p in of_seed if p["cpu_s"] <= (1 + LATER) * cpu_s] for of_seed in after]
    return [of_seed[-1] for of_seed in points] if all(points) else []


def scores(points: Sequence[Record], metrics: Sequence[str], suffix: str = "") -> str:
    """The means of metrics over seeds: "80.1 / 83.0", "-" for what was not measured."""
    def mean(metric: str) -> str:
        values = [p["metrics"][metric + suffix] for p in points if p["metrics"].get(metric + suffix) is not None]
        if not values:
            return "-"
        value = statistics.fmean(values)
        return f"{100 * value:.1f}" if PERCENT.search(metric) else number(value, 3)

    return " / ".join(map(mean, metrics))


def seen(points: Sequence[Record]) -> str:
    """Examples and CPU-minutes, the means over seeds."""
    examples, seconds = (statistics.fmean(p[name] for p in points) for name in ("examples", "cpu_s"))
    return f"{number(examples, 3)}, {seconds / 60:.1f} min"


@told
def main(arguments: list[str]) -> int:
    """Prints the table. Returns 0, or 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m sslx.scaling.scores", usage=__doc__)
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    parser.add_argument("--metrics", default="knn/accuracy,probe/accuracy,rankme")
    parser.add_argument("--minutes", default="")
    given = parser.parse_args(arguments)
    minutes = numbers(given.minutes, "--minutes") if given.minutes else []
    metrics = given.metrics.split(",")
    heads = ["", "FLOPs an example", "random init", *([f"{m:g} CPU-minutes" for m in minutes] or ["end"])]
    print(" / ".join(metrics))
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows(logs(given.runs), metrics, minutes):
        print("| " + " | ".join(row) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
