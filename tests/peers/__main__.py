"""python tests/peers [CASE ...] [--dtypes float32,bfloat16] [--rounds 7] [--steps 3] [--tiny] [--json F]

Training steps of sslx beside those of PyTorch, transformers and lightly in the same shapes (cases.py), on this machine.
Each side is a process of its own; they take turns, one waits while the other steps. A figure is the median over
rounds of the mean step of a round. Peers come twice: as they are, and at their best (a fused optimizer and
torch.compile). --tiny only shows that all runs. gpt2, llama, mae_l and simclr_50 are for an accelerator and run if
they are named; MFU is then that of its data sheet. Wants `pip install -e .[peers]`, or --python for an interpreter
that has it.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from cases import CASES, INPUTS, JPEG, LARGE
from PIL import Image

READS = 20  # batches for a step, so that few of them were read ahead
HERE = pathlib.Path(__file__).parent
SIDES = {"sslx": ("ours", "plain"), "peer": ("theirs", "plain"), "peer at its best": ("theirs", "best")}


class Side:
    """A process that steps when it is told to."""

    def __init__(self, python: str, side: str, case: str, dtype: str, best: str, data: pathlib.Path):
        self.errors = (data / f"{side}_{best}.log").open("w+")
        command = [python, str(HERE / "worker.py"), side, case, dtype, best, str(data), str(time.time())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                                        text=True)
        self.first_step_s = self.answer()

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise RuntimeError(pathlib.Path(self.errors.name).read_text()[-2000:])
        return json.loads(line)

    def told(self, what: str | int) -> list[float]:
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()


def compared(case: str, dtype: str, rounds: int, steps: int, python: str,
             data: pathlib.Path) -> dict[str, Any]:
    """{side: {"step_s": median, "spread": [low, high], "first_step_s", "mfu" or None} or {"failed": why}}."""
    found: dict[str, Any] = {}
    sides = {}
    for name, (side, best) in SIDES.items():
        try:
            if side == "ours":
                Side(sys.executable, side, case, dtype, best, data).end()  # compiled once, it starts from the cache
            sides[name] = Side(sys.executable if side == "ours" else python, side, case, dtype, best, data)
        except RuntimeError as error:
            found[name] = dict(failed=str(error).strip().splitlines()[-1])
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side.told(2)
    before = {name: side.told("limits") for name, side in sides.items()}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(statistics.fmean(side.told(steps)))
    for name, side in sides.items():
        step_s, limits = statistics.median(seconds[name]), max(before[name], side.told("limits"))
        side.end()
        found[name] = dict(step_s=step_s, spread=[min(seconds[name]), max(seconds[name])],
                           first_step_s=side.first_step_s, mfu=limits[0] / step_s / limits[1] if limits else None)
    return found


def write(case: str, data: pathlib.Path) -> None:
    """What a case reads: 64 M tokens of random letters, or 256 JPEGs of smooth noise."""
    if case in ("rows", "tokens"):
        from sslx.data.prepare import prepare

        (data / "text").mkdir()
        for i in range(4):
            (data / "text" / f"{i}.txt").write_bytes(np.random.default_rng(i).integers(32, 127, 1 << 24, np.uint8))
        prepare(inputs=[str(data / "text")], out=str(data / "tokens"))
    if case == "jpeg":
        (data / "images" / "noise").mkdir(parents=True)
        for i in range(256):
            coarse = np.random.default_rng(i).integers(0, 256, (JPEG[0] // 5, JPEG[1] // 5, 3), np.uint8)
            image = Image.fromarray(coarse).resize(JPEG[::-1], Image.Resampling.BICUBIC)
            image.save(data / "images" / "noise" / f"{i}.jpg", quality=90)


def row(case: str, dtype: str, found: dict[str, Any]) -> str:
    """A line of the table: steps in milliseconds, and how many times faster than each peer."""
    ours = found["sslx"]
    cells = [f"{CASES[case].title}, {dtype}"]
    for name in SIDES:
        one = found[name]
        if "failed" in one:
            cells.append(f"failed: {one['failed'][:60]}")
            continue
        low, high = one["spread"]
        cell = f"{1e3 * one['step_s']:.3g} ({1e3 * low:.3g} to {1e3 * high:.3g}), first {one['first_step_s']:.1f} s"
        cell += f", MFU {one['mfu']:.0%}" if one["mfu"] else ""
        cells.append(cell if name == "sslx" or "failed" in ours else f"{cell}: {one['step_s'] / ours['step_s']:.2f}x")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/peers", usage=__doc__)
    parser.add_argument("cases", nargs="*", default=[], choices=[*CASES, []])
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    given = parser.parse_args()
    if given.tiny:
        os.environ["PEERS_TINY"] = "1"  # cases.py of the workers
    everything = {}
    print("| ms a step | " + " | ".join(SIDES) + " |\n|" + "---|" * (1 + len(SIDES)))
    for case in given.cases or [name for name in CASES if name not in LARGE]:
        for dtype in ["uint8"] if case in INPUTS else given.dtypes.split(","):
            with tempfile.TemporaryDirectory() as folder:
                data = pathlib.Path(folder)
                write(case, data)
                steps = given.steps * (READS if case in INPUTS else 1)
                found = compared(case, dtype, given.rounds, steps, given.python, data)
            everything[f"{case} {dtype}"] = found
            print(row(case, dtype, found), flush=True)
    if given.json:
        given.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
