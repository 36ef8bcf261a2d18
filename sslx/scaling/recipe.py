"""From a planned size and budget to the run: a shape in a config's proportions, its steps, and its time on a pod."""

import functools
import math
import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

from sslx import aot, config, flops, workdir
from sslx.config import UserError, changed
from sslx.scaling import grid
from sslx.scaling.grid import FEWEST_STEPS, Changes, Cost, Study
from sslx.topology import topology

COUNTS = {"n_params": flops.n_params, "n_params_nonembedding": flops.n_params_nonembedding}


class Recipe(NamedTuple):
    """A run: `changes` of the config make it. n: parameters, as the law counts them; epochs over the config's data."""

    changes: Changes
    cost: Cost
    n: int
    steps: int

    @property
    def d(self) -> int:
        return self.steps * self.cost.tokens

    @property
    def flops(self) -> int:
        return self.steps * self.cost.flops


def recipe(study: Study, given: set[str], n: float, budget: float, count: str, rows_least: int = 1) -> Recipe:
    """The run of about `n` parameters that spends `budget` FLOPs, counted on what is trained.

    Fields that flags have set (`given`) stay; else learning rate and batch of text are Step Law's, as in a sweep.
    Raises UserError for a network without width, depth and heads, and a budget of too few steps.
    """
    shape = size(study, given, n, count)
    rows, text = study.data.batch_size, study.source.info.modality == "text"
    first = study.cost(shape, rows)
    d = budget / first.flops * first.tokens
    if text and "data.batch_size" not in given:
        rows = max(rows_least, grid.rows_of("steplaw", d, first.tokens / rows, study))
    cost = study.cost(shape, rows)
    steps = round(budget / cost.flops)
    if steps < FEWEST_STEPS:
        raise UserError(f"the budget is {steps} steps of {rows} rows, {cost.flops:.3g} FLOPs each: take a larger one,"
                        " or fewer rows (--config.data.batch_size)")
    changes = shape | {"data.batch_size": rows} | grid.lasting(study, steps)
    if text and "optim.learning_rate" not in given and not study.sections["model"].get("base"):
        changes["optim.learning_rate"] = grid.rate_of("steplaw", cost.n, d, study)
    return Recipe(changes, cost, cost.n_params if count == "n_params" else cost.n, steps)


def size(study: Study, given: set[str], n: float, count: str) -> Changes:
    """Width, depth and heads nearest to `n` parameters and to the config's width : depth; a head keeps its width.

    With a width or depth that is `given` the other makes the size.
    """
    model = study.sections["model"]
    if missing := [name for name in ("width", "depth", "heads") if not model.get(name)]:
        raise UserError(f"config.model has no {missing[0]}: a plan shapes networks of width, depth and heads. Leave"
                        " --config out, and choose the fields of this network for the size that the plan names")
    wide, deep = "model.width" in given, "model.depth" in given
    proportion, head = model["width"] / model["depth"], model["width"] // model["heads"]
    step = math.lcm(model["heads"] // model["kv_heads"] if model.get("kv_heads") else 1,
                    max(1, study.conf.mesh.get("tensor", 1)))  # heads go by groups of queries, and over devices

    def shape(heads: int, depth: int) -> Changes:
        return grid.of_shape(f"{heads * head}x{depth}x{heads}", model)

    def depth_of(heads: int) -> int:
        return model["depth"] if deep else max(1, round(heads * head / proportion))

    @functools.cache
    def params(heads: int, depth: int) -> int:
        return COUNTS[count](study.step(shape(heads, depth), study.data.batch_size).current.params)

    most = model["heads"] if wide else smallest(lambda i: params(i * step, depth_of(i * step)) >= n) * step
    tried: list[tuple[float, int, int]] = []
    for heads in (most,) if wide else (most, most - step):
        if heads:
            depth = depth_of(heads)
            if not deep:
                layer = params(heads, depth + 1) - params(heads, depth)
                depth = max(1, depth + round((n - params(heads, depth)) / layer))
            stretched = 0.0 if wide or deep else abs(math.log(heads * head / depth / proportion))
            tried.append((abs(math.log(params(heads, depth) / n)) + stretched, heads, depth))
    _, heads, depth = min(tried)
    return shape(heads, depth)


def smallest(holds: Callable[[int], bool]) -> int:
    """The least integer from 1 for which `holds`, which stays true."""
    high = 1
    while not holds(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def command(study: Study, given: set[str], named: str, found: Recipe) -> str:
    """The command line of the run."""
    flat = workdir.flat(config.plain(study.conf))
    changes = {name: flat[name] for name in sorted(given) if name in flat} | found.changes
    flags = " ".join(shlex.quote(f"--config.{name}={value}") for name, value in config.redacted(changes).items())
    return f"python -m sslx.main --config {shlex.quote(named)} --workdir W {flags}"


def on_pod(study: Study, found: Recipe, name: str, mfu: float) -> dict[str, Any]:
    """What the compiler says of the run on a slice: fits, and hours at `mfu`, at the roofline and as scheduled."""
    target = topology(name)
    made = aot.report(aot.step_of(changed(study.conf, found.changes), target.devices), target)
    chips = made["devices"] / target.generation.devices_per_chip
    at_peak = found.flops / (made["devices"] * made["peak_flops"]) / 3600
    pod = {k: made[k] for k in ("topology", "devices", "fits", "hbm_peak_bytes", "hbm_limit_bytes")}
    pod |= dict(chips=chips, mfu=mfu, hours=at_peak / mfu, chip_hours=at_peak / mfu * chips)
    if made["fits"]:
        pod |= dict(mfu_if_hidden=made["mfu_if_hidden"], mfu_if_exposed=made["mfu_if_exposed"],
                    hours_roofline=at_peak / made["mfu_if_hidden"], hours_scheduled=found.steps * made["step_s"] / 3600)
    return pod
