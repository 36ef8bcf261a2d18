"""python -m sslx.scaling.study RUNS... --out studies/NAME/runs

Cuts the logs of runs, so that a study is small enough to be committed: run records, events, evaluations, and a few
training points of each run, in NAME/runs/<run>/metrics.jsonl, without the folders that files were in. Everything that
reads logs reads them.

A study is a folder:
    study.json           {title, metric, label, n}: what is fitted, how an axis calls it, n_params or
                         n_params_nonembedding; of a table also {columns: {n, d, c, loss, ...}, group}
    runs/                logs, whole or cut; of a table points.csv or points.jsonl
    law.json             python -m sslx.scaling.fit NAME/runs --json NAME/law.json
    prediction.json      the same with --predict N:D, written before the runs that it is about
    predicted/           the logs of these runs; of a table predicted.csv or predicted.jsonl
All but study.json and runs may be missing.
"""

import argparse
import json
import os
import pathlib
import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from sslx import log
from sslx.command import told
from sslx.config import UserError, nearest
from sslx.scaling.law import Law
from sslx.scaling.points import Points, from_runs, from_table
from sslx.workdir import flat, write_atomically

KEPT = 8  # training points of a run
Logs = dict[str, tuple[log.Record, list[log.Record]]]  # {name: (run, points)}
FIELDS = ("title", "metric", "label", "n", "columns", "group")
TABLES = (".csv", ".jsonl")


class Study(NamedTuple):
    """folder:      where it is.
    title, label: of the study, and of an axis of its metric.
    points:      of `metric` at the end of each run.
    law, predictions, measured: if there are any; predictions are {n, d, loss, lo, hi}, measured their runs.
    """

    folder: pathlib.Path
    title: str
    label: str
    points: Points
    law: Law | None
    predictions: list[dict[str, float]]
    measured: Points | None


def read(folder: pathlib.Path | str) -> Study:
    """The study of a folder. Raises UserError for what is no study, and for runs that make no law."""
    folder = pathlib.Path(folder)
    about = settings(folder)
    points = points_of(folder, "runs", "points", about)
    if points is None:
        raise UserError(f"{folder} has neither runs/ nor points.csv: a study has logs or a table")
    law, prediction = loaded(folder / "law.json"), loaded(folder / "prediction.json")
    return Study(folder, about.get("title", folder.name), about.get("label", points.metric), points,
                 Law.from_json(law) if law else None, (prediction or {}).get("predictions", []),
                 points_of(folder, "predicted", "predicted", about))


def settings(folder: pathlib.Path) -> dict[str, Any]:
    about = loaded(folder / "study.json")
    if about is None:
        raise UserError(f"{folder} is no study: it has no study.json, as python -m sslx.scaling.study --help shows one")
    for name in about:
        if name not in FIELDS:
            raise UserError(f"{folder / 'study.json'} has an unknown field {name!r}{nearest(name, FIELDS)}")
    return about


def loaded(path: pathlib.Path) -> dict[str, Any] | None:
    """The object that a file holds; None if there is no file."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no object")
    return found


def points_of(folder: pathlib.Path, runs: str, table: str, about: dict[str, Any]) -> Points | None:
    """Points of the logs below folder/runs, or of folder/table.csv or .jsonl."""
    if (folder / runs).is_dir():
        return from_runs([folder / runs], about.get("metric", "heldout/loss"), about.get("n", "n_params"))
    files = [folder / f"{table}{suffix}" for suffix in TABLES if (folder / f"{table}{suffix}").exists()]
    return from_table(files[0], about.get("columns", {}), about.get("group")) if files else None


def workdirs(folders: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """All below `folders` that hold a log. Raises UserError if there are none."""
    folders = list(folders)
    found = sorted({p.parent for f in folders for p in f.rglob("metrics.jsonl")})
    if not found:
        raise UserError(f"no metrics.jsonl below {', '.join(map(str, folders))}")
    return found


def logs(folders: Iterable[pathlib.Path | str]) -> Logs:
    """The logs of all runs below `folders`, by the paths of their workdirs from the folder that holds all."""
    where = workdirs(map(pathlib.Path, folders))
    root = os.path.commonpath([w.absolute().parent for w in where])
    found = {os.path.relpath(w, root): log.read(w) for w in where}
    return {name: (runs[-1], points) for name, (runs, points) in found.items() if runs}


def ends(found: Logs, metric: str, count: str = "n_params") -> list[dict[str, Any]]:
    """What each run ended with, by folder, size and FLOPs: {run, n, d, flops, epochs, value}.

    value is None if the metric is missing.
    """
    last = {name: (run, [p for p in points if p["split"] == "eval"][-1:]) for name, (run, points) in found.items()}
    rows = [dict(run=name, n=run[count], d=p["tokens_seen"], flops=p["flops_model"], epochs=p["epochs"],
                 value=p["metrics"].get(metric)) for name, (run, judged) in last.items() for p in judged]
    return sorted(rows, key=lambda r: (os.path.dirname(r["run"]), r["n"], r["flops"]))


def table(rows: Iterable[dict[str, Any]], metric: str) -> str:
    """The `ends` of runs for people."""
    rows = list(rows)
    wide = max((len(r["run"]) for r in rows), default=3)
    lines = [f"{'run':<{wide}} {'N':>9} {'D':>9} {'FLOPs':>9} {'epochs':>7}  {metric}"]
    for r in rows:
        value = "-" if r["value"] is None else f"{r['value']:.4f}"
        lines.append(f"{r['run']:<{wide}} {r['n']:>9.3g} {r['d']:>9.3g} {r['flops']:>9.3g} {r['epochs']:>7.3g}"
                     f"  {value}")
    return "\n".join(lines)


def by_objective(folders: Iterable[pathlib.Path | str], metric: str, count: str = "n_params") -> dict[str, Points]:
    """{objective: points of a metric} of the runs below `folders`: metrics compare objectives, losses do not."""
    groups = defaultdict(list)
    for workdir in workdirs(map(pathlib.Path, folders)):
        groups[log.read(workdir)[0][-1]["objective"]].append(workdir / "metrics.jsonl")
    return {objective: from_runs(files, metric, count) for objective, files in groups.items()}


def cut(records: list[log.Record], kept: int = KEPT) -> list[log.Record]:
    """The records of a log without most of its training points: `kept` of them, the last among them."""
    training = [r for r in records if r["kind"] == "point" and r["split"] == "train"]
    every = max(1, -(-len(training) // kept))
    stay = {id(r) for r in training[::-1][::every]}
    return [portable(r) for r in records if r["kind"] != "point" or r["split"] != "train" or id(r) in stay]


def portable(record: log.Record) -> log.Record:
    """A record whose files are named without the folders of the machine where they were."""
    text = json.dumps(record)
    files = {x for x in flat(record.get("config", {})).values() if isinstance(x, str) and os.path.isabs(x)}
    for file in sorted(files, key=len, reverse=True):
        text = text.replace(file, os.path.basename(file))
    return json.loads(text)


@told
def main(arguments: list[str]) -> int:
    """Writes cut logs. Returns 0, or 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m sslx.scaling.study", usage=__doc__)
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    given = parser.parse_args(arguments)
    found = workdirs(given.runs)
    if len({w.name for w in found}) < len(found):
        raise UserError("several of these runs have workdirs of the same name: cut them into folders of their own")
    for workdir in found:
        records = cut(log.records(workdir))
        path = given.out / workdir.name / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(map(log.line, records)))
        print(f"{path}: {len(records)} records, {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
