"""The log of a workdir: metrics.jsonl is the truth, TensorBoard and the progress bar are for looking at.

metrics.jsonl holds one {"kind": "run", ...} record, then a {"kind": "point", ...} per log or evaluation, and an
{"kind": "event", ...} for what happened to the run. Its schema is the same for all objectives; notebooks, fits and
reports read it and nothing else.
"""

import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from sslx.config import UserError
from sslx.workdir import write_atomically

SCHEMA_VERSION = 1
OBJECTS = ("config", "flops_per_example", "versions")  # fields of a run that are read as such
MAX_DIGITS = 300
Record = dict[str, Any]


class Logger:
    """Writes one workdir's log, from one process (`show`); the others' loggers do nothing.

    A run that is not resumed, at `resume_step`, begins with the `history` of its trunk, if it is a branch.

    earlier: seconds of the run before it was resumed, by what they were spent on (`clock.Clock`). earlier_cpu_s,
    earlier_j: CPU-seconds, and joules, NaN if they are not known.
    """

    def __init__(self, workdir: pathlib.Path, run: Record, resume_step: int | None, total_steps: int, show: bool,
                 history: Sequence[Record] = ()):
        self.show, self.earlier, self.earlier_cpu_s, self.earlier_j, self.shown_at = show, {}, 0.0, 0.0, -1
        self.path, self.run = workdir / "metrics.jsonl", {"kind": "run", "schema_version": SCHEMA_VERSION, **run}
        if not show:
            return
        self.bar = tqdm(total=total_steps, unit="step", file=sys.stdout, dynamic_ncols=True, smoothing=0.05,
                        disable=not sys.stdout.isatty())
        if resume_step is None:
            write_atomically(self.path, "".join(map(line, (self.run, *history))))
        if resume_step is not None:
            self.earlier = self.rewind(resume_step, "resumed")
        elif history:
            self.earlier = self.rewind(run["branched_from"]["step"], "branched")
        else:
            self.open_board(0)

    def open_board(self, step: int) -> None:
        """TensorBoard from `step` on; what it shows of later ones was dropped."""
        self.board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step)
        self.bar.n = self.bar.initial = max(step - 1, 0)

    def rewind(self, step: int, event: str, wall_s: float | None = None, **fields: Any) -> dict[str, float]:
        """Drops points after `step`, which will be written again, and records the event. Returns the time spent so far.

        What was spent since `step` is `lost`: up to now, when the run had `wall_s`, or as far as the log tells. A
        machine that changed is a new run record.
        """
        found = records(self.path.parent)
        stays = {"run": lambda r: r.get("resumed_from", 0) <= step, "point": lambda r: r["step"] <= step,
                 "event": lambda r: r["step"] <= step or "lost_s" in r}
        left = [r for r in found if stays[r["kind"]](r)]
        runs, kept, happened = ([r for r in left if r["kind"] == kind] for kind in ("run", "point", "event"))
        spent = kept[-1].get("spent", {"step": kept[-1].get("wall_s", 0.0)}) if kept else {}
        self.earlier_cpu_s = kept[-1].get("cpu_s", 0.0) if kept else 0.0
        self.earlier_j = kept[-1].get("energy_j", math.nan) if kept else math.nan
        spent |= {"lost": sum(e.get("lost_s", 0.0) for e in happened)}
        now_s = max((r.get("wall_s", 0.0) for r in found), default=0.0) if wall_s is None else wall_s
        lost_s = max(0.0, now_s - sum(spent.values()))
        if step < self.bar.total:
            left.append({"kind": "event", "event": event, "step": step, "lost_s": lost_s, **fields})
        if not runs or identity(runs[-1]) != identity(strict(self.run)):
            left.append({**self.run, "resumed_from": step})
        write_atomically(self.path, "".join(map(line, left)))
        self.open_board(step + 1)
        return spent | {"lost": spent["lost"] + lost_s}

    def append(self, record: Record) -> None:
        with self.path.open("a") as file:
            file.write(line(record))

    def point(self, *, step: int, metrics: Record, split: str, **fields: Any) -> None:
        """One point of the log."""
        if not self.show:
            return
        metrics, fields = strict(metrics), strict(fields)
        self.append({"kind": "point", "step": step, **fields, "split": split, "metrics": metrics})
        numbers = {f"{split}/{name}".replace("@", "_"): v for name, v in metrics.items()}
        numbers |= {name: fields[name] for name in ("lr", "tokens_per_s", "mfu", "hfu", "joules_per_token")
                    if name in fields}
        for name, value in numbers.items():
            if value is not None:
                self.board.add_scalar(name, value, step)
        if split == "eval" and step:
            tqdm.write(f"step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()), file=sys.stdout)

    def event(self, event: str, step: int, **fields: Any) -> None:
        """Something that happened to the run, for the log and the person at the terminal."""
        if self.show:
            self.append({"kind": "event", "event": event, "step": step, **fields})
            self.say(f"step {step}: {event}" + "".join(f", {name} {value}" for name, value in fields.items()))

    def progress(self, step: int, *, loss: float, tokens_per_s: float, mfu: float | None) -> None:
        """The bar on a terminal; elsewhere a line at every twentieth part of the run."""
        if not self.show:
            return
        shown = {"loss": f"{loss:.4f}", "tokens/s": f"{tokens_per_s:,.0f}", "MFU": "-" if mfu is None else f"{mfu:.0%}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)
        part = 20 * step // self.bar.total
        if self.bar.disable and part != self.shown_at:
            self.shown_at = part
            print(f"step {step}/{self.bar.total}  " + "  ".join(f"{k} {v}" for k, v in shown.items()), flush=True)

    def say(self, text: str) -> None:
        """A line for the person at the terminal."""
        if self.show:
            tqdm.write(text, file=sys.stdout)

    def close(self) -> None:
        if self.show:
            self.bar.close()
            self.board.close()


def record_examples(workdir: pathlib.Path, process: int, step: int, rows: list[int], index: list[int]) -> None:
    """Adds to W/examples/<process>.jsonl which examples of the source a step read, at which rows of its batch."""
    folder = workdir / "examples"
    folder.mkdir(exist_ok=True)
    with (folder / f"{process}.jsonl").open("a") as file:
        file.write(line({"step": step, "rows": rows, "index": index}))


def identity(run: Record) -> Record:
    """What makes two run records the same. A CPU's peak is measured anew at every start."""
    return {k: v for k, v in run.items() if k not in ("peak_flops", "resumed_from")}


def strict(value: Any) -> Any:
    """The value as strict JSON gives it back: no NaN, no tuples, no arrays of NumPy or JAX."""
    if isinstance(value, dict):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return strict(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def line(record: Record) -> str:
    return json.dumps(strict(record), allow_nan=False) + "\n"


def read(workdir: pathlib.Path | str) -> tuple[list[Record], list[Record]]:
    """(runs, points) of a workdir's metrics.jsonl. A last line cut short by a kill is left out.

    Raises UserError if there is no log, or a line within it is no record of a run.
    """
    found = records(workdir)
    return [r for r in found if r["kind"] == "run"], [r for r in found if r["kind"] == "point"]


def events(workdir: pathlib.Path | str) -> list[Record]:
    """What happened to a run: resumptions, bad steps, roll-backs, alarms. Raises UserError as `read` does."""
    return [r for r in records(workdir) if r["kind"] == "event"]


def records(workdir: pathlib.Path | str) -> list[Record]:
    path = pathlib.Path(workdir)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path} does not exist: {workdir} is no workdir of a run")
    found = []
    lines = path.read_bytes().split(b"\n")
    for at, text in enumerate(lines, 1):
        try:
            if text:
                found.append(parse(text))
        except (ValueError, RecursionError) as error:
            if at < len(lines):
                raise UserError(f"{path} line {at} is no record of a run ({error}); remove the line") from error
    return found


def parse(text: bytes) -> Record:
    """One line of the log, whose fields can be computed with. Raises ValueError."""
    record = json.loads(text.decode(), parse_int=integer)
    match record:
        case {"kind": "run"}:
            wrong = [k for k in OBJECTS if not isinstance(record.get(k) or {}, dict)]
            wrong += [k for k in ("resumed_from",) if not is_number(record.get(k, 0))]
        case {"kind": "point", "step": int(), "split": str(), "metrics": dict(metrics)}:
            wrong = [k for k, value in metrics.items() if value is not None and not is_number(value)]
            spent = record.get("spent") or {}
            times = {"spent": spent} if not isinstance(spent, dict) else spent | {
                name: record.get(name, 0) for name in ("wall_s", "cpu_s", "energy_j")}
            wrong += [k for k, value in times.items() if not is_number(value)]
        case ({"kind": "event", "step": int(), "event": "resumed" | "branched" | "collapsed"}
              | {"kind": "event", "step": int(), "event": "skipped", "why": str()}
              | {"kind": "event", "step": int(), "event": "rolled back", "why": str(), "bad_step": int(),
                 "passed_over": [int(), int()]}):
            wrong = [k for k in ("lost_s",) if not is_number(record.get(k, 0))]
        case _:
            raise ValueError("it is no run, no event, and no point with step, split and metrics")
    if wrong:
        raise ValueError(f"its {wrong[0]} is {str(record.get(wrong[0]))[:40]!r}")
    return record


def integer(digits: str) -> int:
    """An integer of JSON. Raises ValueError for one beyond all floats."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def summary(workdir: pathlib.Path | str) -> str:
    """A table of the newest value of every evaluated metric beside its baselines."""
    _, points = read(workdir)
    newest: dict[str, float] = {}
    for point in points:
        if point["split"] == "eval":
            newest |= {k: v for k, v in point["metrics"].items() if v is not None}
    names = [name for name in newest if "@" not in name]
    rows: list[tuple[str, ...]] = [("metric", "random init", "raw input", "final")]
    for name in names:
        values = (newest.get(f"{name}@random_init"), newest.get(f"{name}@raw"), newest[name])
        rows.append((name, *("-" if v is None else f"{v:.4g}" for v in values)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(cells) for cells in aligned)
