"""python -m sslx.bench --config configs/X.py[:arg] [--steps 20] [--data-only] [--profile DIR] [--json F]
                      [--config.a.b=value]

What a config costs on this machine: time to the first step, the step, its FLOP/s against what the machine can do,
memory, and how long the devices wait for data. Nothing is kept.

--steps      that are timed, after two that are not.
--data-only  the input alone: read, decoded, stacked and put on the devices, without a step.
--profile    also a trace of a few steps in DIR, for TensorBoard or Perfetto, and the ten dearest operations by the
             source line that asked for them.
--json       the same as JSON.
"""

import json
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from sslx import command, experiment, flops, platforms, state, train
from sslx.command import Flag, told
from sslx.config import UserError
from sslx.data import pipeline
from sslx.experiment import Experiment
from sslx.profile import dearest
from sslx.report import duration, number, scientific, whole
from sslx.state import TrainState

WARM_UP, NO_END = 2, 2**31 - 1  # steps
TRACED = 3  # steps of a profile

FLAGS = {
    "steps": Flag(int, "Steps that are timed."),
    "data-only": Flag(bool, "The input alone."),
    "profile": Flag(str, "Folder for a trace."),
    "json": Flag(str, "File for the figures."),
}


class Spread(NamedTuple):
    """Seconds: quartiles of several."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)


@told
def main(arguments: list[str]) -> int:
    """Parses flags, sets the platform up, measures, prints. Returns 0, or 2 for a mistake."""
    began = time.monotonic()
    conf, flags = command.parse("bench", __doc__, FLAGS, arguments)
    steps = 20 if flags["steps"] is None else flags["steps"]
    if steps < 2:
        raise UserError(f"--steps is {steps}; it takes at least 2, of which there is a median and a spread")
    if flags["profile"] and pathlib.Path(flags["profile"]).is_file():
        raise UserError(f"--profile={flags['profile']} is a file; it takes a folder, which is made")
    print(f"platform {platforms.prepare()}", flush=True)
    platforms.enable_compilation_cache()
    built = experiment.build(conf)
    with jax.set_mesh(built.mesh):
        found = (of_data(built, steps) if flags["data-only"] else
                 of_steps(built, steps, began, flags["profile"]))
    print("\n".join(f"{name:<22}{text}" for name, text in lines(found)))
    if flags["json"]:
        pathlib.Path(flags["json"]).write_text(json.dumps(found, indent=1) + "\n")
    return 0


def of_steps(built: Experiment, steps: int, began: float, profile: str | None) -> dict[str, Any]:
    """What the steps of a config cost: the JSON of the command. `began`: when the process did, on the monotonic clock.

    FLOP/s and memory are those of one device; seconds those of a step.
    """
    mesh, rows = built.mesh, built.data.batch_size
    device, dtype = jax.devices()[0], built.config["model"].get("dtype", "bfloat16")
    batches = built.batches(0, NO_END)
    batch = next(batches)[0]
    unborn = state.abstract(built.objective, built.optimizer, built.run.seed, batch)
    counted = train.count_flops(built.objective, unborn, batch)
    step: Any = train.step_of(built)
    lowered, trace_s = timed(lambda: step.lower(unborn, batch))
    compiled, compile_s = timed(lowered.compile)
    current = state.create(built.objective, built.optimizer, built.run.seed, batch)
    current, metrics = compiled(current, batch)
    tokens = int(metrics["tokens"])
    first_step_s = time.monotonic() - began
    before = flops.ceiling(device, dtype)
    current, _, _ = stepped(compiled, current, batches, WARM_UP)
    current, seconds, waited_s = stepped(compiled, current, batches, steps)
    sharing = jax.local_device_count() if device.platform == "cpu" else 1  # simulated devices
    ceiling = max(before, flops.ceiling(device, dtype)) / sharing
    step_s = Spread.of(seconds)
    model, hardware = (n / mesh.size / step_s.median for n in (counted.model_total, counted.hw_total))
    sheet = flops.sheet_flops(device, dtype)
    found = dict(
        device=device.device_kind, devices=mesh.size, dtype=dtype, batch_size=rows, first_step_s=first_step_s,
        trace_s=trace_s, compile_s=compile_s, steps=steps, step_s=step_s._asdict(), examples_per_s=rows / step_s.median,
        tokens_per_s=tokens / step_s.median, flops_per_step=counted.model_total, model_flops_per_s=model,
        hardware_flops_per_s=hardware, ceiling=ceiling, mfu=model / ceiling, hfu=hardware / ceiling,
        mfu_of_sheet=model / sheet if sheet else None, waited_share=waited_s / sum(seconds),
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes, peak_bytes=peak_bytes(device))
    if profile:
        with jax.profiler.trace(profile):
            stepped(compiled, current, batches, TRACED)
        found["dearest"] = [line._asdict() for line in dearest(pathlib.Path(profile), compiled.as_text(), TRACED)]
    batches.close()
    return found


def of_data(built: Experiment, steps: int) -> dict[str, Any]:
    """What reading costs, with nothing else to do."""
    batches, rows = built.batches(0, NO_END), built.data.batch_size
    first_s = timed(lambda: jax.block_until_ready(next(batches)[0]))[1]
    seconds = [timed(lambda: jax.block_until_ready(next(batches)[0]))[1] for _ in range(WARM_UP + steps)][WARM_UP:]
    size = sum(x.nbytes for x in next(batches)[0].values())
    units = rows * (built.source.info.length or 1)
    batches.close()
    total_s = sum(seconds)
    return dict(source=built.source.info.name, workers=built.data.workers, batch_size=rows, steps=steps,
                first_batch_s=first_s, batch_s=Spread.of(seconds)._asdict(), examples_per_s=steps * rows / total_s,
                units_per_s=steps * units / total_s, bytes_per_s=steps * size / total_s)


def timed(do: Any) -> tuple[Any, float]:
    """(what it returns, seconds)."""
    start = time.perf_counter()
    return do(), time.perf_counter() - start


def stepped(step: Any, current: TrainState, batches: pipeline.Batches, n: int) -> tuple[TrainState, list[float], float]:
    """(state, seconds of each of n steps, seconds for which the devices had nothing to do but to wait for a batch).

    As in training the next step is handed over while one runs, so that no time goes by between them.
    """
    ends, waited, before = [time.perf_counter()], 0.0, None
    for _ in range(n):
        (batch, _), took = timed(lambda: next(batches))
        waited += took if before is None or before.is_ready() else 0.0
        current, metrics = step(current, batch)
        if before is not None:
            before.block_until_ready()
            ends.append(time.perf_counter())
        before = metrics["loss"]
    jax.block_until_ready(current)
    ends.append(time.perf_counter())
    return current, [b - a for a, b in zip(ends, ends[1:], strict=False)], waited


def peak_bytes(device: jax.Device) -> int:
    """The most memory that was used: of the device, or of the process where that is a CPU."""
    if found := device.memory_stats():
        return found["peak_bytes_in_use"]
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) of what was measured, for people."""
    if "batch_s" in found:
        yield "source", f"{found['source']}, {found['workers']} reading processes"
        yield "first batch", duration(found["first_batch_s"])
        yield "a batch", f"{spread(found['batch_s'])} for {found['batch_size']} rows"
        yield "input", f"{whole(found['examples_per_s'])} examples/s, {whole(found['units_per_s'])} units/s, " \
                       f"{found['bytes_per_s'] / 1e6:.3g} MB/s"
        return
    yield "device", f"{found['devices']} x {found['device']}, {found['dtype']}"
    yield "first step", (f"{duration(found['first_step_s'])} from the start: {duration(found['trace_s'])} of tracing,"
                         f" {duration(found['compile_s'])} of compiling")
    yield "a step", f"{spread(found['step_s'])}, {found['steps']} of them"
    yield "throughput", f"{whole(found['tokens_per_s'])} tokens/s, {number(found['examples_per_s'])} examples/s"
    yield "FLOPs", f"{scientific(found['flops_per_step'])} a step"
    yield "FLOP/s of a device", (f"{scientific(found['model_flops_per_s'])}; the fastest product does"
                                 f" {scientific(found['ceiling'])} here")
    yield "MFU, HFU", (f"{found['mfu']:.1%}, {found['hfu']:.1%} of that"
                       + (f"; {found['mfu_of_sheet']:.1%} of the data sheet" if found["mfu_of_sheet"] else ""))
    yield "waiting for data", f"{found['waited_share']:.1%} of the time"
    yield "memory", (f"{found['peak_bytes'] / 2**30:.3g} GiB at most, {found['temporary_bytes'] / 2**30:.3g} GiB of a"
                     " step's own")
    for line in found.get("dearest", ()):
        yield line["where"] or "(no line)", f"{line['share']:>6.1%} {line['seconds'] * 1e3:>9.3g} ms  {line['does']}"


def spread(seconds: dict[str, float]) -> str:
    return f"{duration(seconds['median'])} ({duration(seconds['low'])} to {duration(seconds['high'])})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
