"""python tests/growth [AXIS ...] [--steps 9] [--json F] [--svg F]

What a step costs as one thing about it grows: its time, the memory of its own and its FLOPs, each point in a process
of its own (`sslx.bench`). The exponent is that of the time, and of the memory, in the FLOPs over the upper half of an
axis: 1 is as the work grows.
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

from sslx.scaling import plots

HERE = pathlib.Path(__file__).parent


class Axis(NamedTuple):
    """`names`: flags that take the value, or as many times it as the key says; `variants`: flags that are compared."""

    config: str
    names: dict[str, float]
    values: Sequence[int]
    variants: dict[str, Sequence[str]]


PLAIN = {"": ()}
REMAT = PLAIN | {"remat": ("model.remat=full",)}
AXES = {
    "width": Axis("text", {"model.width": 1, "model.heads": 1 / 64}, (64, 128, 256, 512, 1024), REMAT),
    "depth": Axis("text", {"model.depth": 1}, (1, 2, 4, 8, 16), REMAT | {"scanned": ("model.scan=True",)}),
    "batch": Axis("text", {"data.batch_size": 1}, (2, 4, 8, 16, 32, 64), REMAT),
    "length": Axis("text", {"model.max_length": 1, "data.train.length": 1}, (64, 128, 256, 512, 1024, 2048), REMAT),
    "vocabulary": Axis("text", {"model.vocab_size": 1, "data.train.vocab_size": 1}, (1024, 4096, 16384, 65536),
                       PLAIN | {"8 chunks": ("model.loss_chunks=8",)}),
    "pairs": Axis("pairs", {"data.batch_size": 1}, (64, 128, 256, 512, 1024, 2048),
                  PLAIN | {"8 chunks": ("objective.chunks=8",)}),
    "local crops": Axis("crops", {"objective.n_local": 1}, (1, 2, 4, 8, 16), PLAIN),
}


def flags(axis: Axis, value: int, variant: str) -> list[str]:
    """What tells `sslx.bench` of a point."""
    changes = [f"{name}={round(value * times)}" for name, times in axis.names.items()] + [*axis.variants[variant]]
    return ["--config", f"{HERE / 'config.py'}:{axis.config}", *(f"--config.{change}" for change in changes)]


def point(axis: Axis, value: int, variant: str, steps: int) -> dict[str, Any]:
    """The figures of one point."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "found.json"
        subprocess.run([sys.executable, "-m", "sslx.bench", *flags(axis, value, variant), f"--steps={steps}",
                        f"--json={file}"], check=True, stdout=subprocess.DEVNULL)
        found = json.loads(file.read_text())
    step_s = found["step_s"]["median"]  # on one device
    return dict(value=value, step_s=step_s, flops=step_s * found["hardware_flops_per_s"],
                bytes=found["temporary_bytes"], ceiling=found["ceiling"])


def exponent(points: Sequence[dict[str, Any]], what: str) -> float:
    """Of `what` in the FLOPs, over the upper half of an axis."""
    low, high = points[len(points) // 2 - 1], points[-1]
    return math.log(high[what] / low[what]) / math.log(high["flops"] / low["flops"])


@plots.styled
def drawn(measured: dict[str, dict[str, list[dict[str, Any]]]]) -> plots.Plot:
    """Time above, memory below, a column for each axis. Dashed: the FLOPs as fast as a large product does them."""
    figure = plots.Plot(figsize=(2 * plots.PAGE, 1.6 * plots.HEIGHT), layout="constrained")
    above, below = figure.subplots(2, len(measured), squeeze=False)
    for (name, variants), time, memory in zip(measured.items(), above, below, strict=True):
        for shade, mark, (variant, points) in zip(plots.shades(len(variants)), plots.MARKS, variants.items(),
                                                  strict=False):
            values = [p["value"] for p in points]
            time.plot(values, [1e3 * p["step_s"] for p in points], marker=mark, color=shade, label=variant or "plain")
            memory.plot(values, [p["bytes"] / 2**20 for p in points], marker=mark, color=shade)
        plain = next(iter(variants.values()))
        fastest = statistics.median(p["ceiling"] for p in plain)
        time.plot([p["value"] for p in plain], [1e3 * p["flops"] / fastest for p in plain], "--", color=plots.SOFT)
        plots.log_x(time, "")
        plots.log_x(memory, name)
        plots.log_y(time, "ms a step" if name == next(iter(measured)) else "")
        plots.log_y(memory, "MiB of its own" if name == next(iter(measured)) else "")
        if len(variants) > 1:
            time.legend(loc="best")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/growth", usage=__doc__)
    parser.add_argument("axes", nargs="*", default=[], choices=[*AXES, []])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--svg", type=pathlib.Path)
    given = parser.parse_args()
    measured: dict[str, dict[str, list[dict[str, Any]]]] = {}
    print("| grows | | ms a step | MiB of its own | time, memory in the FLOPs |\n|---|---|---|---|---|")
    for name in given.axes or [*AXES]:
        axis = AXES[name]
        measured[name] = {}
        for variant in axis.variants:
            points = [point(axis, value, variant, given.steps) for value in axis.values]
            measured[name][variant] = points
            print(f"| {name} {axis.values[0]} to {axis.values[-1]} | {variant or 'plain'} | "
                  + ", ".join(f"{1e3 * p['step_s']:.3g}" for p in points) + " | "
                  + ", ".join(f"{p['bytes'] / 2**20:.3g}" for p in points)
                  + f" | {exponent(points, 'step_s'):.2f}, {exponent(points, 'bytes'):.2f} |", flush=True)
    if given.json:
        given.json.write_text(json.dumps(measured, indent=1) + "\n")
    if given.svg:
        white = 'style="background: white; '  # also where pages are dark
        given.svg.write_text(plots.svg(drawn(measured)).replace('style="', white, 1) + "\n")


if __name__ == "__main__":
    main()
