"""python -m sslx.scaling.sweep --config configs/X.py[:arg] --out RUNS --sizes 64x2,96x3,128x4
        --budgets 1e12,3e12,1e13 | --grid ladder --tokens-per-parameter 20,40
        [--seeds 0,1] [--branches] [--learning-rate steplaw|config|NUMBER] [--batch-size steplaw|config|ROWS]
        [--jobs N] [--rate FLOPS] [--dry-run | --yes | --write] [--config.a.b=value]

The runs of a scaling law from one config: says what they are and what they cost, then does them, each in RUNS/NAME.
The same command again goes on where it was stopped, and repeats nothing that is finished.

--sizes     WIDTHxDEPTH[xHEADS], the rest in proportion to the config; or the fields that make a size, for any network:
            "model.width=16,model.stages=(1,1);model.width=32,model.stages=(2,2)".
--grid      isoflop: every size at every budget, in model FLOPs, counted on the jaxpr of what is trained.
            ladder: every size on so many tokens for each parameter (embeddings are none).
--branches  of a size only the longest run starts anew; the others branch from it (schedule "wsd") and pay for their
            decay. They share its learning rate and batch.
--learning-rate, --batch-size
            steplaw is Step Law (sslx/scaling/steplaw.py): the default for text, but for what a --config flag sets, and
            for the learning rate of a config in muP (model.base), which holds for all widths.
--jobs      so many runs at a time, each on its share of the cores, if the memory allows it.
--rate      model FLOP/s to expect; without it they are measured, in the smallest and the largest of the runs.
--write     starts nothing: RUNS/runs.txt has a line of flags for each run, for python -m sslx.main or a script of
            launch/: sbatch launch/slurm.sbatch $(sed -n 3p RUNS/runs.txt). Branches come after their trunks.
--dry-run   shows the plan. --yes starts without asking.

What the config counts in steps (warm-up, decay, ...) keeps its share of them; evaluated is at the end.
"""

import pathlib
import re
import shutil
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_collections

from sslx import checkpoint, command, config, log, platforms, workdir
from sslx.command import Flag, told
from sslx.config import UserError, changed
from sslx.report import duration
from sslx.scaling import jobs
from sslx.scaling.grid import Changes, Planned, Study, grid_of, numbers, planned
from sslx.scaling.jobs import Job

CALIBRATION_STEPS = 8
FIELD = re.compile(r"--?(?:no)?config\.([^=[]+)")  # a flag that sets one
FINISHED = "finished"
FAILED, INTERRUPTED = 1, 130

FLAGS = {
    "out": Flag(str, "Folder of the runs.", required=True),
    "budgets": Flag(str, "FLOPs, such as 1e12,3e12."),
    "sizes": Flag(str, "WIDTHxDEPTH[xHEADS],... or FIELD=VALUE,...;..."),
    "seeds": Flag(str, "Seeds of every run."),
    "grid": Flag(str, "isoflop or ladder."),
    "tokens-per-parameter": Flag(str, "Of a ladder, such as 20,40."),
    "branches": Flag(bool, "Shorter runs branch from the longest of their size."),
    "learning-rate": Flag(str, "steplaw, config or a number."),
    "batch-size": Flag(str, "steplaw, config or a number of rows."),
    "jobs": Flag(int, "How many runs at a time."),
    "rate": Flag(str, "FLOP/s to expect."),
    "write": Flag(bool, "Writes configs and commands, starts nothing."),
    "dry-run": Flag(bool, "Shows the plan."),
    "yes": Flag(bool, "Starts without asking."),
}


def table(plan: list[Planned], states: Mapping[str, str], pace: "Pace | None", at_once: int) -> str:
    """The plan for people."""
    wide = max(len(p.name) for p in plan)
    lines = [f"{'run':<{wide}} {'N':>8} {'rows':>6} {'lr':>8} {'steps':>8} {'tokens':>8} {'epochs':>7} {'FLOPs':>8}"
             f" {'time':>7}"]
    for p in plan:
        remarks = [*[states[p.name]] * bool(states[p.name]), *[f"branches at {p.trunk_step}"] * bool(p.trunk)]
        lines.append(f"{p.name:<{wide}} {p.cost.n:>8.3g} {p.changes['data.batch_size']:>6}"
                     f" {p.changes['optim.learning_rate']:>8.2g} {p.steps:>8} {p.steps * p.cost.tokens:>8.3g}"
                     f" {p.epochs:>7.2g} {p.flops:>8.3g} {duration(pace(p)) if pace else '-':>7}"
                     f"  {', '.join(remarks)}".rstrip())
    left = [p for p in plan if states[p.name] != FINISHED]
    lines.append(f"{len(left)} of {len(plan)} runs to do: {sum(p.flops for p in left):.3g} FLOPs"
                 + (f", about {duration(sum(pace(p) for p in left) / at_once)}" if pace else "")
                 + (f", {at_once} at a time" if at_once > 1 else ""))
    return "\n".join(lines)


def state_of(study: Study, job: Job, p: Planned) -> str:
    """How far a run is. Raises UserError if its folder holds a run of another config or of other data."""
    bound = job.workdir / "config.json"
    if not bound.exists():
        return ""
    mine = config.redacted(config.plain(changed(study.conf, p.changes)))
    mine = workdir.identity(mine, study.source.info.fingerprint)
    if difference := workdir.difference(workdir.bound(bound), mine, workdir.FREE):
        raise UserError(f"{job.workdir} holds a run of another config ({difference}). Use another --out, or the flags"
                        " of that sweep")
    saved = checkpoint.steps(job.workdir / "checkpoints")
    return FINISHED if jobs.finished(job) else f"at step {saved[-1]}" if saved else ""


# ---- what a plan costs in time


class Pace(NamedTuple):
    """Seconds of a run: `start_s` + steps x (`step_s` + FLOPs of a step / `rate`)."""

    start_s: float
    step_s: float
    rate: float

    def __call__(self, p: Planned) -> float:
        return self.start_s + (p.steps - p.trunk_step) * self.step_s + p.flops / self.rate


def measured(out: pathlib.Path, named: str, plan: list[Planned]) -> Pace:
    """The pace of short runs of the smallest and the largest step, in RUNS/.calibration; they anneal never."""
    found = []
    smallest, largest = (pick(plan, key=lambda p: p.cost.flops) for pick in (min, max))
    for p in dict.fromkeys((smallest.name, largest.name)):
        found.append(calibrated(out, named, next(q for q in plan if q.name == p)))
    (start, low_s, low), (other, high_s, high) = found[0], found[-1]
    if high <= low or high_s <= low_s:
        return Pace(max(start, other), 0.0, high / high_s)
    rate = (high - low) / (high_s - low_s)
    return Pace(max(start, other), max(0.0, low_s - low / rate), rate)


def calibrated(out: pathlib.Path, named: str, p: Planned) -> tuple[float, float, int]:
    """(seconds beside the steps, seconds of a step, FLOPs of a step) of a short run, unless it was done before."""
    folder = out / ".calibration" / p.name
    short = p.changes | {"run.steps": CALIBRATION_STEPS, "optim.steps": p.steps + CALIBRATION_STEPS,
                         "run.eval_every": CALIBRATION_STEPS, "run.save_every": CALIBRATION_STEPS, "run.log_every": 1}
    short = {k: v for k, v in short.items() if k not in ("run.trunk", "run.trunk_step", "run.keep_at")}
    text, file = config_text(named, p.name, short), folder.with_suffix(".py")
    job = Job(file, folder, CALIBRATION_STEPS)
    if not file.exists() or file.read_text() != text or not (folder / "finished").exists():
        shutil.rmtree(folder, ignore_errors=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        print(f"measuring {CALIBRATION_STEPS} steps of {p.name}", flush=True)
        if jobs.start(job).wait():
            raise UserError(f"{p.name} cannot be run: {jobs.reason(job)}")
        shutil.rmtree(folder / "checkpoints")
        (folder / "finished").touch()
    points = log.read(folder)[1]
    step_s = p.cost.tokens / [q["tokens_per_s"] for q in points if q["split"] == "train"][-1]
    return max(0.0, points[-1]["wall_s"] - CALIBRATION_STEPS * step_s), step_s, p.cost.flops


# ---- configs, and the command


def config_text(named: str, name: str, changes: Changes) -> str:
    """A config file: another one, X.py[:arg], with some fields set."""
    path, _, argument = named.partition(":")
    lines = "".join(f"    {field!r}: {value!r},\n" for field, value in changes.items())
    return f'''"""{name}: {path} as sslx.scaling.sweep changed it."""

import runpy

CHANGES = {{
{lines}}}


def get_config():
    config = runpy.run_path({path!r})["get_config"]({repr(argument) if argument else ""})
    config.update_from_flattened_dict(CHANGES)
    return config
'''


def fields_given(arguments: list[str]) -> set[str]:
    """The fields that flags set."""
    return {found[1] for argument in arguments if (found := FIELD.match(argument))}


def run(conf: ml_collections.ConfigDict, flags: Mapping[str, Any], named: str, given: set[str]) -> int:
    """Plans, shows, and does what the flags say. Returns the exit status."""
    out, at_once = pathlib.Path(flags["out"]), 1 if flags["jobs"] is None else flags["jobs"]
    if at_once < 1 or (at_once > 1 and platforms.detect() != "cpu"):
        raise UserError(f"--jobs is {at_once}; it takes 1, or more where runs share no accelerator")
    shared = {name: value for name, value in workdir.flat(config.plain(conf)).items() if name in given}
    if config.redacted(shared) != shared:
        raise UserError("a --config flag holds a secret, which a sweep would write down: let the config read it")
    study = Study(conf)
    plan = [p._replace(changes=shared | p.changes) for p in planned(study, grid_of(flags, study, given, out))]
    todo = {p.name: job_of(out, p) for p in plan}
    states = {p.name: state_of(study, todo[p.name], p) for p in plan}
    left = [p for p in plan if states[p.name] != FINISHED]
    pace = None
    if flags["rate"]:
        pace = Pace(0.0, 0.0, numbers(flags["rate"], "--rate")[0])
    elif left and not flags["write"]:
        pace = measured(out, named, plan)
    print(table(plan, states, pace, at_once), flush=True)
    if flags["dry-run"] or not left:
        return 0
    for p in plan:
        todo[p.name].config.parent.mkdir(parents=True, exist_ok=True)
        workdir.write_atomically(todo[p.name].config, config_text(named, p.name, p.changes))
    if flags["write"]:
        lines = [f"--config={todo[p.name].config} --workdir={todo[p.name].workdir}\n" for p in left]
        workdir.write_atomically(out / "runs.txt", "".join(lines))
        print(f"wrote {len(lines)} configs and {out / 'runs.txt'}")
        return 0
    if not flags["yes"] and not agreed():
        return 0
    failed, stopped = jobs.all_of([todo[p.name] for p in left], at_once, lambda text: print(text, flush=True))
    for name, why in failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    if stopped:
        print("stopped, all that ran is saved; the same command goes on from there", flush=True)
        return INTERRUPTED
    if failed:
        print(f"{len(failed)} of {len(left)} runs failed; the same command tries them again", file=sys.stderr)
        return FAILED
    print(f"all {len(plan)} runs are finished: python -m sslx.scaling.fit {out}")
    return 0


def job_of(out: pathlib.Path, p: Planned) -> Job:
    needs = out / p.trunk / "checkpoints" / str(p.trunk_step) if p.trunk else None
    return Job(out / "configs" / f"{p.name}.py", out / p.name, p.steps, needs, p.cost.state_bytes)


def agreed() -> bool:
    """Whether the person at the terminal wants the plan. Raises UserError where there is nobody to ask."""
    if not sys.stdin.isatty():
        raise UserError("there is no terminal to ask at: --yes starts the plan, --dry-run shows it")
    return input("start? [y/N] ").strip().lower() in ("y", "yes")


@told
def main(arguments: list[str]) -> int:
    """Returns 0 if all is done, 1 if a run failed, 2 for a mistake, 130 if it was stopped."""
    jax.config.update("jax_platforms", "cpu")  # the accelerators are for the runs
    conf, flags = command.parse("scaling.sweep", __doc__, FLAGS, arguments)
    named = command.named_config(["sweep", *arguments])
    return run(conf, flags, str(named), fields_given(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
