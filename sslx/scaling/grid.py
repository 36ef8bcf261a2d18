"""From a grid of sizes and budgets to runs: how many steps each takes, by the exact FLOPs of what is trained."""

import ast
import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from sslx import aot, config, experiment, flops, optim, train
from sslx.config import Steps, UserError, changed
from sslx.objectives.image import grid_patches
from sslx.scaling import steplaw

DECAY = 0.2  # share of a branch, if the config has none (Hägele et al. 2024)
FEWEST_STEPS = 10
SAVES = 10   # of a run

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


# ---- what is asked for


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
    seeds = numbers(flags["seeds"] or "0", "--seeds", 0, int)
    text = study.source.info.modality == "text"  # of which Step Law is
    rate = "config" if not text or "optim.learning_rate" in given or study.conf.model.get("base") else "steplaw"
    batch = "config" if not text or "data.batch_size" in given else "steplaw"
    return Grid(kind == "ladder", targets, sizes_of(flags["sizes"], study), seeds, out, flags["branches"],
                flags["learning-rate"] or rate, flags["batch-size"] or batch)


def numbers(text: str, flag: str, least: float = 1e-9, kind: Callable[[str], Any] = float) -> list[Any]:
    """A list of numbers with commas, each once."""
    try:
        found = [kind(x) for x in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(least <= x < math.inf for x in found):
        whole = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{flag} is {text!r}; it takes {whole} of at least {least}, with commas between them")
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


# ---- the runs


def planned(study: Study, grid: Grid) -> Iterator[Planned]:
    """The runs of a grid: sizes in their order, of each the longest first."""
    optim = study.sections["optim"]
    schedule, decay = optim.get("schedule", "cosine"), optim.get("decay", 0)
    if not grid.branches and (schedule == "constant" or (schedule == "wsd" and not decay)):
        raise UserError(f"config.optim.schedule={schedule!r} with decay={decay}: only annealed runs belong in a law."
                        " Take schedule 'cosine', 'wsd' with a decay, or --branches")
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
    return numbers(choice, "--batch-size (steplaw, config or a number of rows)", 1, int)[0]


def rate_of(choice: str, n: int, d: float, study: Study) -> float:
    """The peak learning rate of `n` parameters on `d` tokens."""
    match choice:
        case "config":
            return study.sections["optim"]["learning_rate"]
        case "steplaw":
            return float(f"{steplaw.learning_rate(n, d):.3g}")
    return numbers(choice, "--learning-rate (steplaw, config or a number)")[0]


def of_group(study: Study, grid: Grid, cost: Cost, made: Changes, steps: dict[str, int]) -> Iterator[Planned]:
    """Runs of one network and seed, {name: steps}; of branches the first, which is the longest, is the trunk."""
    own = {name: in_steps(study, n) for name, n in steps.items()}
    trunk, branches = next(iter(steps)), [*steps][1:] if grid.branches else []
    if grid.branches:  # what they count in steps is their trunk's, but for the decay
        shared = {"optim.warmup": 0} | shares(study, min(steps.values()))
        for name, n in steps.items():
            own[name] |= shared | {"optim.schedule": "wsd",
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
    """What a run of `n` steps sets."""
    calls = n * study.run.accumulate  # of the loss, which those of an objective count
    ends = {f"{section}.steps": steps for section, steps in (("run", n), ("optim", n), ("objective", calls))
            if "steps" in study.sections[section]}
    return ends | shares(study, n)


def shares(study: Study, n: int) -> Changes:
    """Of all that the config counts in steps the same share of `n`."""
    makes = {"objective": config.load("objectives", study.sections["objective"]["name"]), "optim": optim.make}
    return {f"{section}.{name}": round(study.sections[section][name] * n / study.run.steps)
            for section, make in makes.items() for name in config.fields(make, Steps)
            if name in study.sections[section]}
