"""Points of scaling laws: what finished runs, or the rows of a table, say of size, data, compute and loss."""

import contextlib
import csv
import json
import math
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sslx import config, log
from sslx.config import Steps, UserError, nearest
from sslx.scaling.forms import Array, Inputs

APART = math.log(1.2)  # budgets are at least this far apart in ln C
OCTAVE = math.log(2)   # and their own points not farther than this
POINTS = 3             # that a budget has, on average
BINS = 8
COPYING, COPIES = "copying/gain", 0.05  # nats per token
LARGEST_LOSS, SMALLEST_COUNT = 1e3, 1e3
# Of its length, or of no matter for the loss; freeze_prototypes was an objective's field once.
OF_THE_RUN = ("name", "steps", "sample_length", "freeze_prototypes")
ROLES = dict(n="parameters N", d="units seen D", c="FLOPs C", loss="the loss or metric", unique="units that are unique",
             weight="the weight of a row")


class Points(NamedTuple):
    """n, d, c, unique, loss, weight: float[P], parameters, units seen, FLOPs, units that are unique, loss or metric.
    run:      int[P], rows that are not independent of each other: one run, one trunk, one shape.
    metric:   what `loss` is.
    warnings: what is odd about them.
    counted:  what n is, of runs: "n_params" or "n_params_nonembedding".
    """

    n: Array
    d: Array
    c: Array
    unique: Array
    loss: Array
    weight: Array
    run: Array
    metric: str
    warnings: tuple[str, ...] = ()
    counted: str | None = None

    def take(self, rows: Array) -> "Points":
        n, d, c, unique, loss, weight, run = (x[rows] for x in self[:7])
        return self._replace(n=n, d=d, c=c, unique=unique, loss=loss, weight=weight, run=run)

    @property
    def inputs(self) -> Inputs:
        return Inputs(*map(np.log, (self.n, self.d, self.c, np.minimum(self.unique, self.d))))

    @property
    def budget(self) -> Array:
        """int[P], from the smallest: points of about as many FLOPs; where C has no such gaps, bins of ln C.

        A bin is an octave, or wider, so that there are at most BINS.
        """
        ln_c = np.log(self.c)
        order = np.argsort(ln_c, kind="stable")
        cluster = np.empty(len(order), int)
        cluster[order] = np.concatenate([[0], np.cumsum(np.diff(ln_c[order]) > APART)])
        widths = [np.ptp(ln_c[cluster == k]) for k in range(cluster.max() + 1)]
        if max(widths) > OCTAVE or len(widths) > len(order) / POINTS:
            cluster = np.round((ln_c - ln_c.max()) / max(OCTAVE, np.ptp(ln_c) / BINS)).astype(int)
        return np.unique(cluster, return_inverse=True)[1]

    @property
    def rising(self) -> bool:
        """Whether the metric grows with compute."""
        rank = np.argsort(np.argsort(self.c)), np.argsort(np.argsort(self.loss))
        return bool(np.corrcoef(*rank)[0, 1] > 0)


def from_table(path: pathlib.Path, columns: Mapping[str, str | None], group: str | None = None,
               where: Iterable[tuple[str, str]] = ()) -> Points:
    """Points of a .csv or .jsonl file. columns: {role: name}; C is 6 N D without a column of it.

    group: column of what is resampled as one. where: (column, value) that rows must have; of one column, any.
    Raises UserError for what is no table, a column that is missing, and values that cannot be.
    """
    rows = read_rows(path)
    wanted: dict[str, set[str]] = {}
    for column, value in where:
        wanted.setdefault(column, set()).add(value)
    for column in (*(c for c in columns.values() if c), *wanted, *([group] if group else [])):
        known = list(rows[0])
        if column not in known:
            raise UserError(f"{path} has no column {column!r}{nearest(column, known)}")
    kept = [(i, row) for i, row in enumerate(rows, 1)
            if all(str(row.get(column, "")) in values for column, values in wanted.items())]
    if not kept:
        raise UserError(f"no row of {path} has {', '.join(f'{c}={v}' for c, v in where)}; values of the column are, for"
                        f" example, {', '.join(sorted({str(r.get(c)) for r in rows for c in wanted})[:8])}")
    values = {role: np.array([number(row.get(column), f"{path} row {i}, column {column!r} ({ROLES[role]})")
                              for i, row in kept]) for role, column in columns.items() if column}
    runs = np.unique([str(row.get(group)) for _, row in kept], return_inverse=True)[1] if group else None
    return checked(values, runs, columns.get("loss") or "optimum", str(path), columns)


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a table. Raises UserError if it is none."""
    try:
        text = path.read_text()
        if path.suffix == ".csv":
            rows: list[Any] = list(csv.DictReader(text.splitlines()))
        elif path.suffix in (".jsonl", ".ndjson"):
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            raise UserError(f"--table {path}: a table is a .csv with a header, or a .jsonl with an object a line")
    except (OSError, ValueError) as error:
        raise UserError(f"--table {path} cannot be read: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"--table {path} has no rows, or rows that are no objects with named columns")
    return rows


def number(value: Any, where: str) -> float:
    """A positive finite number. Raises UserError for anything else."""
    try:
        x = float(value)
    except (TypeError, ValueError):
        x = math.nan
    if not (math.isfinite(x) and x > 0):
        raise UserError(f"{where} is {value!r}: it takes a positive number; mend or remove the row, or leave it out"
                        " with --where")
    return x


def from_runs(folders: Iterable[pathlib.Path], metric: str, count: str) -> Points:
    """The last point of each run below `folders`: finished, annealed, of one objective and dataset.

    count: "n_params" or "n_params_nonembedding". Raises UserError for runs that do not belong in one law, and warns of
    those of which some copy from their context (evals.copying) and others do not yet.
    """
    workdirs = sorted({p.parent for f in folders for p in ([f] if f.name == "metrics.jsonl" else
                                                           f.rglob("metrics.jsonl"))})
    if not workdirs:
        raise UserError(f"no metrics.jsonl below {', '.join(map(str, folders))}: the command takes workdirs of runs, or"
                        " folders that hold some")
    refused: dict[str, list[str]] = {}
    rows, kinds, gains = [], Counter[str](), {}
    for workdir in workdirs:
        runs, points = log.read(workdir)
        run = runs[-1]
        judged = [p for p in points if p["split"] == "eval" and p["metrics"].get(metric) is not None]
        last = judged[-1] if judged else None
        known = sorted({m for p in points if p["split"] == "eval" for m in p["metrics"]})
        if last is None:
            reason = f"without {metric!r} among the evaluations{nearest(metric, known)}"
        elif last["step"] < run["total_steps"]:
            reason = "unfinished"
        elif last["phase"] != "annealed":
            reason = f"not annealed: the last point is of phase {last['phase']!r}, and only annealed points make a law"
        else:
            rows.append((run[count], last["tokens_seen"], last["flops_model"],
                         last["tokens_seen"] / max(1.0, last["epochs"]), last["metrics"][metric]))
            kinds[kind(run, metric)] += 1
            gains[str(workdir)] = last["metrics"].get(COPYING)
            continue
        refused.setdefault(reason, []).append(str(workdir))
    if refused:
        raise UserError("; ".join(f"{len(which)} of {len(workdirs)} runs {reason} ({some(which)})"
                                  for reason, which in refused.items())
                        + ". Finish these runs or name the others only")
    if len(kinds) > 1:
        raise UserError(f"losses of different objectives or data share no law, and these runs are of {len(kinds)}: "
                        + "; ".join(f"{n} of {name}" for name, n in kinds.items()))
    values = dict(zip(("n", "d", "c", "unique", "loss"), np.array(rows, float).T, strict=True))
    found = checked(values, None, metric, "the runs", {role: role for role in values})
    return found._replace(counted=count, warnings=found.warnings + of_copying(gains))


def some(names: list[str]) -> str:
    """The first of them."""
    return ", ".join(names[:3] + ["..."] * (len(names) > 3))


def of_copying(gains: Mapping[str, float | None]) -> tuple[str, ...]:
    """A warning if of these runs some copy and others do not; of one without a number nothing is known."""
    known = {name: gain for name, gain in gains.items() if gain is not None}
    copy = [name for name, gain in known.items() if gain > COPIES]
    if len(copy) in (0, len(known)):
        return ()
    return (f"{len(copy)} of {len(known)} runs copy from their context ({COPYING} above {COPIES}: {some(copy)}): their"
            " loss has fallen at once, below the curve of the others. Fit one side alone",)


def kind(run: Mapping[str, Any], metric: str) -> str:
    """What two runs must have in common for this metric of theirs to be comparable: objective with its settings, data,
    and of a held-out loss that is of the batch the size of a batch."""
    lasting: list[str] = []
    with contextlib.suppress(UserError):  # it may be another version's
        lasting = config.fields(config.load("objectives", run["objective"]), Steps)
    section = {k: v for k, v in run["config"]["objective"].items() if k not in (*OF_THE_RUN, *lasting)}
    rows = run.get("heldout_batch") if metric.startswith("heldout/") else None  # older logs have none
    batch = f" in batches of {rows}" if rows else ""
    return f"{run['objective']} {section}{batch} on {run['dataset']}"


def checked(values: dict[str, Array], runs: Array | None, metric: str, where: str,
            columns: Mapping[str, str | None]) -> Points:
    """Points, without rows that are there twice. Raises UserError for columns that cannot be what they should."""
    warnings = []
    loss = values.get("loss")
    for role in ("n", "d"):
        if role in values and values[role].max() < SMALLEST_COUNT and loss is not None:
            raise UserError(f"column {columns[role]!r} of {where}, taken for {ROLES[role]}, holds"
                            f" {values[role].min():.4g} to {values[role].max():.4g}, which looks like a loss: are the"
                            " columns swapped?")
    if loss is not None and {"n", "d"} <= values.keys() and np.median(loss) > LARGEST_LOSS:
        raise UserError(f"column {columns['loss']!r} of {where}, taken for {ROLES['loss']}, holds {loss.min():.4g} to"
                        f" {loss.max():.4g}, which looks like a count: are the columns swapped?")
    if {"n", "d"} <= values.keys():
        per = values["d"] / values["n"]
        if np.median(per) < 0.2:
            warnings.append(f"D/N is {np.median(per):.3g} in the middle row: are --n and --d swapped?")
        if "c" in values and not 0.5 < np.median(values["c"] / values["n"] / values["d"]) < 200:
            per = values["c"] / values["n"] / values["d"]
            warnings.append(f"C/(N D) is {np.median(per):.3g} in the middle row, and usually about 6: is --c in FLOPs?")
        if np.any(values.get("unique", 0) > values["d"] * (1 + 1e-9)):
            warnings.append("some rows have more unique units than units seen; they count as not repeated")
    first = next(iter(values.values()))
    rows = np.unique(np.stack(list(values.values())), axis=1, return_index=True)[1]
    rows.sort()
    if len(rows) < len(first):
        warnings.append(f"{len(first) - len(rows)} of {len(first)} rows are duplicates and count once")
    one = np.ones(len(first))
    n, d = values.get("n", one), values.get("d", one)
    points = Points(n=n, d=d, c=values.get("c", 6 * n * d), unique=values.get("unique", d),
                    loss=one if loss is None else loss, weight=values.get("weight", one),
                    run=np.arange(len(first)) if runs is None else runs, metric=metric, warnings=tuple(warnings))
    return points.take(rows)
