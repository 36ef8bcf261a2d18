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

import ast
import functools
import math
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from sslx import aot, checkpoint, command, config, experiment, flops, log, platforms, train, workdir
from sslx.command import Flag
from sslx.config import UserError
from sslx.objectives.image import grid_patches
from sslx.report import duration
from sslx.scaling import jobs, steplaw
from sslx.scaling.jobs import Job

# What a config counts in steps.
SHARES = ("optim.warmup", "optim.decay", "objective.temperature_warmup", "objective.freeze_prototypes")
DECAY = 0.2        # share of a branch, if the config has none (Hägele et al. 2024)
FEWEST_STEPS = 10
SAVES = 10         # of a run
CALIBRATION_STEPS = 8
FIELD = re.compile(r"--?(?:no)?config\.([^=[]+)")
FINISHED = "finished"
FAILED, INTERRUPTED = 1, 130

Changes = dict[str, Any]


class Cost(NamedTuple):
    """Of one step of a network at a batch: what the plan divides by.

    n: parameters without embeddings, n_params: all. tokens: corpus units, padding included.
    """

    n: int
    n_params: int
    flops: int
    tokens: int
    state_bytes: int


class Planned(NamedTuple):
    """A run of the plan. `changes` of the config make it; a branch begins with step `trunk_step` of the run `trunk`."""

    name: str
    changes: Changes
    cost: Cost
    steps: int
    epochs: float
    trunk: str | None = None
    trunk_step: int = 0

    @property
    def flops(self) -> int:
        """That are spent for it: a branch's trunk is paid already."""
        return (self.steps - self.trunk_step) * self.cost.flops


class Grid(NamedTuple):
    """What the flags ask for. targets: label -> budget in FLOPs, or tokens per parameter on a ladder."""

    ladder: bool
    targets: dict[str, float]
    sizes: dict[str, Changes]
    seeds: list[int]
    out: pathlib.Path
    branches: bool
    learning_rate: str
    batch_size: str


class Study:
    """A config, its data, and what a step costs of the networks that it can be changed to."""

    def __init__(self, conf: ml_collections.ConfigDict):
        self.conf = conf
        # On one device, whatever mesh the runs will have: FLOPs do not depend on it.
        built = experiment.build(changed(conf, {"mesh": {}}), jax.devices()[:1])
        self.source, self.run, self.data, self.sections = built.source, built.run, built.data, built.config

    def step(self, changes: Changes, rows: int) -> aot.Step:
        conf = changed(self.conf, changes | {"data.batch_size": rows, "mesh": {}, "evals": {}})
        return aot.abstract_step(experiment.build(conf, jax.devices()[:1], self.source))

    def cost(self, changes: Changes, rows: int) -> Cost:
        step = self.step(changes, rows)
        with jax.set_mesh(step.built.mesh):
            counted = train.count_flops(step.built.objective, step.current, step.batch)
        model, info = config.build("models", step.built.config["model"], "config.model"), step.built.source.info
        params = step.current.params
        return Cost(flops.n_params_nonembedding(params), flops.n_params(params), counted.model_total,
                    rows * (info.length or grid_patches(model, info)), aot.local_bytes(step.current))


def changed(conf: ml_collections.ConfigDict, changes: Changes) -> ml_collections.ConfigDict:
    """The config with some fields, such as "model.width", set. Raises UserError for a section that is not there."""
    conf = conf.copy_and_resolve_references()
    try:
        with conf.unlocked():
            conf.update_from_flattened_dict(changes)
    except (KeyError, TypeError) as error:
        raise UserError(f"a size cannot be set in this config: {error.args[0]}") from error
    return conf


# ---- what the flags say


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


def grid_of(flags: Mapping[str, Any], study: Study, given: set[str], out: pathlib.Path) -> Grid:
    """The grid that the flags ask for; `given` are the fields of the config that flags have set."""
    kind = flags["grid"] or "isoflop"
    if kind not in ("isoflop", "ladder"):
        raise UserError(f"--grid is {kind!r}; it takes isoflop or ladder")
    wanted, other = ("tokens-per-parameter", "budgets") if kind == "ladder" else ("budgets", "tokens-per-parameter")
    if flags[other] is not None:
        raise UserError(f"--{other} says nothing of --grid={kind}, which takes --{wanted}")
    if kind == "isoflop" and not flags[wanted]:
        raise UserError("--budgets is missing: it takes FLOPs, such as --budgets=1e12,3e12,1e13")
    targets = {re.sub(r"e\+0*", "e", f"{n:g}"): n for n in numbers(flags[wanted] or "20", f"--{wanted}")}
    targets = {f"{label}tpp": n for label, n in targets.items()} if kind == "ladder" else targets
    seeds = [int(x) for x in numbers(flags["seeds"] or "0", "--seeds", least=0)]
    text = study.source.info.modality == "text"  # of which Step Law is
    rate = "config" if not text or "optim.learning_rate" in given or study.conf.model.get("base") else "steplaw"
    batch = "config" if not text or "data.batch_size" in given else "steplaw"
    return Grid(kind == "ladder", targets, sizes_of(flags["sizes"], study), seeds, out, flags["branches"],
                flags["learning-rate"] or rate, flags["batch-size"] or batch)


def numbers(text: str, flag: str, least: float = 1e-9) -> list[float]:
    """A list of numbers with commas, each once."""
    try:
        found = [float(x) for x in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(least <= x < math.inf for x in found):
        raise UserError(f"{flag} is {text!r}; it takes positive numbers with commas between them")
    return list(dict.fromkeys(found))


def sizes_of(text: str | None, study: Study) -> dict[str, Changes]:
    """{name: the changes that make a size}."""
    if not text:
        raise UserError("--sizes is missing: it takes shapes, such as --sizes=64x2,96x3,128x4, or fields:"
                        " --sizes=\"model.width=16;model.width=32\"")
    if "=" not in text:
        return {shape.strip(): of_shape(shape.strip(), study.sections["model"]) for shape in text.split(",")}
    sizes = [dict(field(f) for f in re.split(r",(?![^(\[]*[)\]])", size)) for size in text.split(";") if size.strip()]
    return {name_of(changes): changes for changes in sizes}


def of_shape(shape: str, model: Mapping[str, Any]) -> Changes:
    """"64x2" or "64x2x4": width, depth, heads; what else goes with the width does so in proportion."""
    found = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?", shape)
    if not found:
        raise UserError(f"--sizes holds {shape!r}; it takes WIDTHxDEPTH or WIDTHxDEPTHxHEADS, such as 128x4 or 128x4x2")
    if missing := [name for name in ("width", "depth") if name not in model]:
        raise UserError(f"--sizes={shape}: config.model has no {missing[0]}; say which fields make a size, such as"
                        " --sizes=\"model.width=16,model.stages=(1,1);model.width=32,model.stages=(2,2)\"")
    width, depth, heads = (int(n) if n else None for n in found.groups())
    scaled = {name: max(1, round(model[name] * width / model["width"]))
              for name in ("heads", "kv_heads", "hidden") if model.get(name)}
    scaled |= {"heads": heads} if heads else {}
    return {f"model.{name}": n for name, n in {"width": width, "depth": depth, **scaled}.items()}


def field(text: str) -> tuple[str, Any]:
    """"model.width=16" -> ("model.width", 16)."""
    name, equals, value = text.strip().partition("=")
    if not equals or "." not in name:
        raise UserError(f"--sizes holds {text.strip()!r}; it takes fields of the config, such as model.width=16")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def name_of(changes: Changes) -> str:
    """A folder's name: "width16_stages1.1"."""
    parts = (f"{name.rpartition('.')[2]}{value}" for name, value in changes.items())
    return "_".join(re.sub(r"[^\w.]+", ".", part).strip(".") for part in parts)


# ---- the plan


def planned(study: Study, grid: Grid) -> Iterator[Planned]:
    """The runs of a grid: sizes in their order, of each the longest first."""
    if study.sections["optim"].get("schedule", "cosine") == "constant" and not grid.branches:
        raise UserError("config.optim.schedule is 'constant': only annealed runs belong in a law. Take 'cosine', 'wsd',"
                        " or --branches")
    if grid.branches and "steps" in study.sections["objective"]:
        raise UserError("--branches: config.objective has a schedule over objective.steps, which a branch would have"
                        " to share with its trunk; leave --branches out")
    for name, size in grid.sizes.items():
        cost = functools.cache(functools.partial(study.cost, size))
        first = cost(study.data.batch_size)
        tokens = {label: first.n * x if grid.ladder else x / first.flops * first.tokens
                  for label, x in grid.targets.items()}
        labels = sorted(tokens, key=tokens.__getitem__, reverse=True)
        for alike in [labels] if grid.branches else [[label] for label in labels]:
            d = math.exp(np.mean([math.log(tokens[label]) for label in alike]))
            rows = rows_of(grid.batch_size, d, first.tokens / study.data.batch_size, study)
            step = cost(rows)
            rate = rate_of(grid.learning_rate, step.n, d, study)
            steps = {label: round(tokens[label] / step.tokens if grid.ladder else grid.targets[label] / step.flops)
                     for label in alike}
            for label, n in steps.items():
                if n < FEWEST_STEPS:
                    raise UserError(f"{name} at {label}: {step.flops:.3g} FLOPs a step of {rows} rows leave {n} steps,"
                                    f" fewer than {FEWEST_STEPS}: take a smaller size or batch, or a larger budget")
            for seed in grid.seeds:
                made = size | {"data.batch_size": rows, "optim.learning_rate": rate, "run.seed": seed}
                names = {f"{name}_{label}_s{seed}": n for label, n in steps.items()}
                yield from of_group(study, grid, step, made, names)


def rows_of(choice: str, d: float, tokens_of_row: float, study: Study) -> int:
    """Rows of a batch for `d` tokens: of Step Law a power of two, which divides over any mesh."""
    match choice:
        case "config":
            return study.data.batch_size
        case "steplaw":
            return max(2 ** round(math.log2(steplaw.batch_tokens(d) / tokens_of_row)), study.run.accumulate, 1)
    [rows] = numbers(choice, "--batch-size (steplaw, config or a number of rows)", 1)
    return int(rows)


def rate_of(choice: str, n: int, d: float, study: Study) -> float:
    match choice:
        case "config":
            return study.sections["optim"]["learning_rate"]
        case "steplaw":
            return float(f"{steplaw.learning_rate(n, d):.3g}")
    [rate] = numbers(choice, "--learning-rate (steplaw, config or a number)")
    return rate


def of_group(study: Study, grid: Grid, cost: Cost, made: Changes, steps: dict[str, int]) -> Iterator[Planned]:
    """Runs of one network and seed, {name: steps}; of branches the first, which is the longest, is the trunk."""
    own = {name: in_steps(study, n) for name, n in steps.items()}
    trunk, branches = next(iter(steps)), [*steps][1:] if grid.branches else []
    if grid.branches:
        shortest = in_steps(study, min(steps.values()))
        for name, n in steps.items():
            own[name] |= {"optim.schedule": "wsd", "optim.warmup": shortest.get("optim.warmup", 0),
                          "optim.decay": own[name].get("optim.decay") or round(DECAY * n)}
    starts = {name: steps[name] - own[name]["optim.decay"] for name in branches}
    for name, start in starts.items():
        own[name] |= {"run.trunk": str(grid.out / trunk), "run.trunk_step": start}
    if starts:
        own[trunk]["run.keep_at"] = tuple(sorted(set(starts.values())))
    for name, n in steps.items():
        epochs = n * made["data.batch_size"] / len(study.source.examples)
        yield Planned(name, made | own[name], cost, n, epochs, trunk if name in starts else None, starts.get(name, 0))


def in_steps(study: Study, n: int) -> Changes:
    """What a run of `n` steps of a sweep sets: it is evaluated at the end."""
    return lasting(study, n) | {"run.eval_every": n, "run.eval_first": False, "run.save_every": math.ceil(n / SAVES)}


def lasting(study: Study, n: int) -> Changes:
    """What a run of `n` steps sets: shares of the config's run.steps."""
    ends = {name: n for name in ("run.steps", "optim.steps")}
    if "steps" in study.sections["objective"]:
        ends["objective.steps"] = n
    flat = workdir.flat(study.sections)
    return ends | {name: round(flat[name] * n / study.run.steps) for name in SHARES if flat.get(name) is not None}


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
        pace = measured(out, named, left)
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


def main(arguments: list[str]) -> int:
    """Returns 0 if all is done, 1 if a run failed, 2 for a mistake, 130 if it was stopped."""
    jax.config.update("jax_platforms", "cpu")  # the accelerators are for the runs
    try:
        conf, flags = command.parse("scaling.sweep", __doc__, FLAGS, arguments)
        named = command.named_config(["sweep", *arguments])
        return run(conf, flags, str(named), fields_given(arguments))
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return error.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
