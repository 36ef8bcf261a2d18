"""python -m sslx.scaling.plan --law LAW.json
       --budget FLOPS | --chip-hours H --chip v5p [--mfu .4]
                      | --money USD --price-per-chip-hour P --chip v5p [--mfu .4]
       [--inference-tokens T] [--unique TOKENS] [--n n_params|n_params_nonembedding]
       [--config configs/X.py[:arg] [--topology v5p:4x4x4] [--config.a.b=value]] [--json OUT]

What to do with a budget, by a law of python -m sslx.scaling.fit --json: sizes and amounts of data whose loss is within
.5 % of the best, smaller networks of the same loss that are cheaper to use, how often data may repeat, and the run.

--mfu               model FLOPs utilization to expect of the chips; of --topology as well. .4 if not given.
--inference-tokens  that the network will read or write in its life, 2 N FLOPs each.
--unique            units of data that there are; a law of the form data-constrained knows what repetition costs.
--n                 what a law of a table counts as N; that of runs knows it. n_params if not given.
--config            gets width, depth, steps and, for text, Step Law's learning rate and batch, as in a sweep.
--topology          compiles the run for this slice: does it fit, how long does it take.
"""

import json
import math
import pathlib
import sys
import textwrap
from typing import Any, NamedTuple

import jax
import numpy as np

from sslx import aot, command
from sslx.command import Flag, told
from sslx.config import UserError, nearest
from sslx.report import duration
from sslx.scaling import grid, recipe, sweep
from sslx.scaling.forms import Array
from sslx.scaling.law import Law
from sslx.topology import GENERATIONS

FLAT = 0.005                    # of the loss: choices so close to the best are as good
SHOWN = 3                       # choices of the flat region, on each side of the best
SMALLER = (0.75, 0.5, 0.35, 0.25, 0.15)
FAR, TOO_FAR = 10.0, 1000.0     # beyond the largest budget of the fit
EPOCHS = 4.0                    # repetitions that cost next to nothing (Muennighoff et al. 2023)
MFU = 0.4
COARSE = 0.2                    # of ln N: how far a config's shapes may be from a planned size
MOST_DATA = 30.0                # of the best amount: what over-training may take


class Choice(NamedTuple):
    """A size and an amount of data: what it costs, and the loss that is expected of it with its interval."""

    n: float
    d: float
    flops: float
    loss: float
    lo: float
    hi: float


class Smaller(NamedTuple):
    """A smaller network of the same loss. Of training, `overhead` of FLOPs; of inference, `saving`: shares.

    pays_from: tokens of inference from which on it costs less in all.
    """

    n: float
    d: float
    flops: float
    overhead: float
    saving: float
    pays_from: float


def choice(law: Law, n: float, d: float, unique: float | None) -> Choice:
    low, high = law.interval(n, d, unique)
    return Choice(float(n), float(d), float(law.flops.of(n, d)), float(law.loss(n, d, unique)[0]), float(low[0]),
                  float(high[0]))


def flat_region(law: Law, c: float, unique: float | None = None) -> tuple[Choice, list[Choice]]:
    """(the best choice for c FLOPs, choices from the smallest to the largest whose loss is within FLAT of it).

    Raises UserError for a law without N and D.
    """
    if not {"A", "B"} <= law.params.keys():
        raise UserError(f"--law is of the form {law.form!r}, which knows compute only, and has no best size: fit one"
                        " with --form chinchilla")
    n = np.geomspace(1e2, c / 6, 8001)
    d = c / law.flops.of(n, 1.0)
    loss = law.loss(n, d, unique)
    best = int(loss.argmin())
    good = np.flatnonzero(loss <= (1 + FLAT) * loss[best])
    shown = np.unique(np.r_[np.linspace(good[0], best, SHOWN), np.linspace(best, good[-1], SHOWN)].round().astype(int))
    return choice(law, n[best], d[best], unique), [choice(law, n[i], d[i], unique) for i in shown]


def data_for(law: Law, n: Array, loss: float, start: float, unique: float | None = None) -> Array:
    """float[P], the data with which sizes n[P] reach a loss, from `start` to MOST_DATA times it; NaN if none does."""
    low, high = np.full(len(n), math.log(start)), np.full(len(n), math.log(start * MOST_DATA))
    reached = law.loss(n, np.exp(high), unique) <= loss
    for _ in range(60):
        middle = (low + high) / 2
        enough = law.loss(n, np.exp(middle), unique) <= loss
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(reached, np.exp(high), np.nan)


def smaller(law: Law, best: Choice, shares: Array, unique: float | None = None) -> list[Smaller]:
    """Networks of these shares of the best one's size, trained until they are as good; without those that never are."""
    n = best.n * shares
    d = data_for(law, n, best.loss, best.d, unique)
    trained = law.flops.of(n, d)
    return [Smaller(float(n), float(d), float(c), float(c / best.flops - 1), float(1 - n / best.n),
                    float((c - best.flops) / (2 * (best.n - n))))
            for n, d, c in zip(n, d, trained, strict=True) if math.isfinite(d)]


def for_inference(law: Law, best: Choice, tokens: float, unique: float | None = None) -> Smaller | None:
    """The network as good as the best one whose training and `tokens` of inference cost least; None for that one."""
    found = smaller(law, best, np.geomspace(0.03, 0.99, 200), unique)
    cheapest = min(found, key=lambda s: s.flops + 2 * s.n * tokens, default=None)
    if cheapest is None or cheapest.flops + 2 * cheapest.n * tokens >= best.flops + 2 * best.n * tokens:
        return None
    return cheapest


def within_epochs(law: Law, c: float, unique: float, epochs: float = EPOCHS) -> Choice:
    """Data that repeat what there is so often, and the size that spends the rest of c FLOPs."""
    d = unique * epochs
    n = np.geomspace(1e2, c / 6, 8001)
    best = n[np.abs(np.log(law.flops.of(n, d) / c)).argmin()]
    return choice(law, best, d, unique)


def cautions(law: Law, c: float, best: Choice, unique: float | None) -> list[str]:
    """Warnings about the plan; those of the law come first. Raises UserError for a budget beyond all that it knows."""
    beyond = c / law.c_max
    if beyond > TOO_FAR:
        raise UserError(f"the budget of {c:.3g} FLOPs is {beyond:.3g} times the largest that the law was fitted to,"
                        f" {law.c_max:.3g}: no law is known to hold so far. Run some of {law.c_max * FAR:.3g} FLOPs,"
                        " fit again, and see whether the law had predicted them")
    found = list(law.report["warnings"])
    reached = max((f["extrapolation"] for f in law.report["backtest"]["folds"]), default=1.0)
    if beyond > FAR or beyond > reached > 1:
        found.append(f"the budget is {beyond:.3g} times the largest that was fitted; back-tests reached"
                     f" {reached:.3g} times")
    smallest, largest = np.exp(law.flops.ln_n[[0, -1]])
    if best.n < smallest or (best.n > largest and beyond <= 1):
        found.append(f"the best size, {best.n:.3g}, is none that was fitted: these were {smallest:.3g} to"
                     f" {largest:.3g}; run some on both sides of the best")
    if unique is not None and best.d > EPOCHS * unique:
        known = "" if law.form == "data-constrained" else ", and the law, which knows fresh data only, expects too much"
        found.append(f"the best choice sees the data {best.d / unique:.3g} times: beyond about {EPOCHS:g} epochs they"
                     f" are worth less and less (Muennighoff et al. 2023){known}")
    return found


# ---- the budget


FLAGS = {
    "law": Flag(str, "JSON of python -m sslx.scaling.fit.", required=True),
    "budget": Flag(float, "Model FLOPs."),
    "chip-hours": Flag(float, "Chips x hours."),
    "money": Flag(float, "With --price-per-chip-hour."),
    "price-per-chip-hour": Flag(float, "In the currency of --money."),
    "chip": Flag(str, f"One of {', '.join(GENERATIONS)}."),
    "mfu": Flag(float, "Model FLOPs utilization to expect."),
    "n": Flag(str, f"What the law counts: {' or '.join(recipe.COUNTS)}."),
    "topology": Flag(str, "The slice, such as v5p:4x4x4; needs --config."),
    "inference-tokens": Flag(float, "Tokens that the network will read or write."),
    "unique": Flag(float, "Units of data that there are."),
    "json": Flag(str, "File for the plan."),
}


def budget_of(flags: dict[str, Any]) -> tuple[float, str]:
    """(model FLOPs, in words). Raises UserError for flags that do not say one budget."""
    for name, flag in FLAGS.items():
        if flag.kind is float and flags[name] is not None and not 0 < flags[name] < math.inf:
            raise UserError(f"--{name} is {flags[name]:g}; it takes a positive number")
    ways = [name for name in ("budget", "chip-hours", "money") if flags[name] is not None]
    if len(ways) != 1:
        raise UserError(f"{' and '.join(f'--{w}' for w in ways) or 'no budget'} given: a plan takes one of"
                        " --budget FLOPS, --chip-hours H --chip v5p, --money USD --price-per-chip-hour P --chip v5p")
    if flags["mfu"] is not None and flags["mfu"] > 1:
        raise UserError(f"--mfu is {flags['mfu']:g}; it takes a share from 0 to 1, such as .4")
    if ways == ["budget"]:
        return flags["budget"], f"{flags['budget']:.4g} FLOPs"
    chip, mfu = flags["chip"], flags["mfu"] or MFU
    if chip not in GENERATIONS:
        raise UserError(f"--chip is {chip!r}; it takes a kind of chip{nearest(chip, GENERATIONS)}")
    hours = flags["chip-hours"]
    if ways == ["money"]:
        if flags["price-per-chip-hour"] is None:
            raise UserError("--price-per-chip-hour is missing: --money buys chip-hours at that price")
        hours = flags["money"] / flags["price-per-chip-hour"]
    peak = GENERATIONS[chip].peak_flops * GENERATIONS[chip].devices_per_chip
    c = hours * 3600 * peak * mfu
    return c, f"{hours:.4g} chip-hours of {chip} at {mfu:.0%} MFU, {c:.4g} FLOPs"


def read_law(path: str) -> Law:
    try:
        return Law.from_json(json.loads(pathlib.Path(path).read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"--law {path} cannot be read: {error}. It takes the file of python -m sslx.scaling.fit --json"
                        ) from error


# ---- the plan for people


def table(found: dict[str, Any]) -> str:
    """The plan for people."""
    best, flat = found["optimum"], found["flat"]
    lines = [f"budget: {found['budget']['text']}:"
             f" {found['budget']['beyond']:.3g} times the largest budget of the law",
             f"expected loss {best['loss']:.4f}, 90 %: {best['lo']:.4f} to {best['hi']:.4f}",
             f"as good, within {FLAT:.1%} of the loss:", f"  {'N':>10} {'D':>10} {'D/N':>7} {'loss':>8}"]
    lines += [f"  {x['n']:>10.4g} {x['d']:>10.4g} {x['d'] / x['n']:>7.3g} {x['loss']:>8.4f}"
              + ("  best" if x["n"] == best["n"] else "") for x in flat]
    if found["overtraining"]:
        lines += ["as good as the best, and cheaper to use:",
                  f"  {'N':>10} {'D':>10} {'D/N':>7} {'training':>9} {'inference':>10}  pays from"]
    lines += [f"  {s['n']:>10.4g} {s['d']:>10.4g} {s['d'] / s['n']:>7.3g} {s['overhead']:>+9.1%} {-s['saving']:>+10.1%}"
              f"  {s['pays_from']:.3g} tokens" for s in found["overtraining"]]
    if "inference" in found:
        s = found["inference"]
        lines.append(f"for {found['inference_tokens']:.3g} tokens of inference: " + (
            "the best choice is the cheapest" if s is None else
            f"N {s['n']:.4g}, D {s['d']:.4g} cost least, {s['overhead']:+.1%} of training"))
    if "repetition" in found:
        r = found["repetition"]
        lines.append(f"{r['unique']:.4g} unique units: the best choice sees them {r['epochs']:.3g} times"
                     + (f"; within {EPOCHS:g} epochs: N {r['within']['n']:.4g}, D {r['within']['d']:.4g}, loss"
                        f" {r['within']['loss']:.4f}" if "within" in r else ""))
    if "run" in found:
        r = found["run"]
        lines += [f"the run: N {r['n']:.4g}, D {r['d']:.4g}, {r['steps']} steps, {r['flops']:.4g} FLOPs counted,"
                  f" loss {r['loss']:.4f}, 90 %: {r['lo']:.4f} to {r['hi']:.4f}",
                  " \\\n".join(textwrap.wrap(r["command"], 100, initial_indent="  ", subsequent_indent="      ",
                                           break_long_words=False, break_on_hyphens=False))]
    return "\n".join(lines + pod_lines(found.get("pod")) + [f"warning: {w}" for w in found["warnings"]])


def pod_lines(pod: dict[str, Any] | None) -> list[str]:
    if pod is None:
        return []
    gib = [f"{pod[k] / 2**30:.2f}" for k in ("hbm_peak_bytes", "hbm_limit_bytes")]
    lines = [f"{pod['topology']}: {'fits' if pod['fits'] else 'DOES NOT FIT'}, {gib[0]} of {gib[1]} GiB a device"]
    if not pod["fits"]:
        return [*lines, "  python -m sslx.aot with the flags of the run says which changes help most"]
    return [*lines, f"  {duration(3600 * pod['hours'])} at {pod['mfu']:.0%} MFU, {pod['chip_hours']:.4g} chip-hours;"
            f" {duration(3600 * pod['hours_roofline'])} at the roofline bound ({pod['mfu_if_hidden']:.0%});"
            f" {duration(3600 * pod['hours_scheduled'])} as the compiler schedules it"]


# ---- the command


def plan(law: Law, c: float, text: str = "", inference_tokens: float | None = None,
         unique: float | None = None) -> dict[str, Any]:
    """What to do with c FLOPs: the JSON of the command, without the run."""
    best, flat = flat_region(law, c, unique)
    found: dict[str, Any] = dict(
        budget=dict(flops=c, text=text or f"{c:.4g} FLOPs", beyond=c / law.c_max),
        warnings=cautions(law, c, best, unique),
        optimum=best._asdict(), flat=[x._asdict() for x in flat],
        overtraining=[s._asdict() for s in smaller(law, best, np.array(SMALLER), unique)])
    if inference_tokens is not None:
        cheapest = for_inference(law, best, inference_tokens, unique)
        found |= dict(inference_tokens=inference_tokens, inference=cheapest and cheapest._asdict())
    if unique is not None:
        found["repetition"] = dict(unique=unique, epochs=best.d / unique) | (
            dict(within=within_epochs(law, c, unique)._asdict()) if best.d > EPOCHS * unique else {})
    return found


def run_of(law: Law, found: dict[str, Any], conf: Any, flags: dict[str, Any], named: str, given: set[str]) -> None:
    """Adds the run, and what a pod makes of it, to a plan."""
    count = flags["n"] or law.counted or "n_params"
    if count not in recipe.COUNTS:
        raise UserError(f"--n is {count!r}; it takes{nearest(count, recipe.COUNTS)}")
    if law.counted not in (None, count):
        raise UserError(f"--n is {count}, and the runs of this law were counted by {law.counted}")
    study = grid.Study(aot.offline(conf))
    best, c = found["optimum"], found["budget"]["flops"]
    devices = recipe.topology(flags["topology"]).devices if flags["topology"] else [None]
    made = recipe.recipe(study, given, best["n"], c, count, len(devices))
    expected = choice(law, made.n, made.d, flags["unique"])
    found["run"] = dict(n=made.n, d=made.d, steps=made.steps, flops=made.flops, changes=made.changes,
                        loss=expected.loss, lo=expected.lo, hi=expected.hi,
                        command=recipe.command(study, given, named, made))
    if abs(expected.flops / made.flops - 1) > 0.1:
        found["warnings"].append(f"this config spends {made.flops / made.n / made.d:.3g} N D FLOPs, the runs of the law"
                                 f" {expected.flops / made.n / made.d:.3g}: another context, network or count of N")
    if abs(math.log(made.n / best["n"])) > COARSE:
        found["warnings"].append(f"the shapes of this config come no closer to N {best['n']:.3g} than {made.n:.3g}")
    if flags["topology"]:
        found["pod"] = recipe.on_pod(study, made, flags["topology"], flags["mfu"] or MFU)


@told
def main(arguments: list[str]) -> int:
    """Returns 0, 1 if the run does not fit its pod, 2 for a mistake."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs
    conf, flags = command.parse("scaling.plan", __doc__, FLAGS, arguments, needs_config=False)
    if flags["topology"] and conf is None:
        raise UserError("--config is missing: --topology is about the run of a config")
    law = read_law(flags["law"])
    c, text = budget_of(flags)
    found = plan(law, c, text, flags["inference-tokens"], flags["unique"])
    if conf is not None:
        named = str(command.named_config(["plan", *arguments]))
        run_of(law, found, conf, flags, named, sweep.fields_given(arguments))
    print(table(found))
    if flags["json"]:
        pathlib.Path(flags["json"]).write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found.get("pod", {}).get("fits", True) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
