"""python tests/faults/campaign.py [--kills 100] [--seed 0] [--source mixture|text|packed] [--folder F]

Kills a run of two processes again and again (SIGKILL) and starts it again, as a launcher does, until it ends; then
compares it with a run that nobody touched: the same log, the same final state to the bit, the same examples at every
step, nothing temporary left. Status 0 if all that holds; F, by default a temporary folder, keeps both workdirs.
"""

import argparse
import collections
import itertools
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.append(str(pathlib.Path(__file__).parent.parent))  # as a command it knows its own folder only

import command
import runs

from sslx.checkpoint import UNSEALED, unsealed

MOMENTS = ("start-up", "step", "save", "seal")  # seal: of a checkpoint all is there but its manifest
VICTIMS = {"coordinator": (0,), "worker": (1,), "both": (0, 1)}
FEW = len(MOMENTS) * len(VICTIMS)  # kills of the campaign in small
SAVE_EVERY = 8
SAVE_S = 0.4     # about as long as a save takes
ENDED_S = 20.0   # in which the processes that are left must end by themselves
LAUNCHER_S = 2.0  # after which those are ended that wait for one that never came
RESTARTED = {1, -6, -9}  # the statuses that may be: a failure, JAX's abort, our kill; each is one to start again on


class Kill(NamedTuple):
    """One SIGKILL: what is waited for, who is killed, and how far into it, from 0 to 1."""

    moment: str
    victims: str
    part: float


class Fallen(NamedTuple):
    """Where a kill fell, and how many seconds later the process that was left had ended."""

    moment: str
    victims: str
    survived_s: float
    start_up_s: float  # the shortest time until a first step so far


def plan(kills: int, seed: int) -> list[Kill]:
    """All pairs of moment and victims equally often, in a random order."""
    draw = random.Random(seed)
    pairs = list(itertools.islice(itertools.cycle(itertools.product(MOMENTS, VICTIMS)), kills))
    return [Kill(*pair, draw.random()) for pair in draw.sample(pairs, kills)]


class Whole(NamedTuple):
    """A run that nobody touched."""

    line: tuple[object, ...]  # the command, without a workdir
    steps: int
    workdir: pathlib.Path
    start_up_s: float         # until its first step


def whole(folder: pathlib.Path, source: str, kills: int) -> Whole:
    """Runs two processes on `source` in folder/whole, long enough for so many kills."""
    steps, workdir = 6 * kills, folder / "whole"
    line = ("--config", runs.config(folder, source, runs.UNHURRIED), *runs.with_steps(steps, SAVE_EVERY))
    return Whole(line, steps, workdir, to_the_end(line, workdir))


def begun(workdir: pathlib.Path) -> int:
    """How many steps process 0 has begun, those that it did again included."""
    path = workdir / "examples" / "0.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def sealing(workdir: pathlib.Path) -> bool:
    """Whether all of the newest checkpoint is there but its manifest."""
    folder = workdir / "checkpoints"
    return (folder / str(unsealed(folder))).exists()


def to_the_end(line: tuple, workdir: pathlib.Path) -> float:
    """Lets a run end; returns the seconds until its first step."""
    started, before = time.monotonic(), begun(workdir)
    processes = command.start_all(2, *line, "--workdir", workdir, devices=1)
    command.wait(processes[0], lambda: begun(workdir) > before)
    start_up_s = time.monotonic() - started
    for status, _, err in command.end_all(processes):
        assert status == 0, err
    return start_up_s


def killed(line: tuple, workdir: pathlib.Path, kill: Kill, start_up_s: float) -> Fallen:
    """Starts the run, waits for the moment of `kill`, kills, and returns when all processes have ended."""
    before, mark = begun(workdir), workdir / "checkpoints" / UNSEALED
    processes = command.start_all(2, *line, "--workdir", workdir, devices=1)
    started = time.monotonic()

    def steps() -> int:
        return begun(workdir) - before

    if kill.moment == "start-up":
        command.wait(processes[0], lambda: steps() or time.monotonic() - started > kill.part * start_up_s)
    else:
        command.wait(processes[0], lambda: steps() > 0)
        start_up_s = min(start_up_s, time.monotonic() - started)
        command.wait(processes[0], lambda: steps() > 2 * SAVE_EVERY * kill.part)
    if kill.moment == "step":
        command.wait(processes[0], lambda: not mark.exists())
    if kill.moment == "save":
        command.wait(processes[0], mark.exists)
        time.sleep(kill.part * SAVE_S)
    if kill.moment == "seal":
        command.wait(processes[0], lambda: sealing(workdir))
    moment = "start-up" if not steps() else "seal" if sealing(workdir) else "save" if mark.exists() else "step"
    victims = [processes[i] for i in VICTIMS[kill.victims]]
    for process in victims:
        process.kill()
    at = time.monotonic()
    for process in processes:
        try:
            process.wait(LAUNCHER_S if moment == "start-up" else ENDED_S)
        except subprocess.TimeoutExpired:
            assert moment == "start-up", f"a process goes on {ENDED_S:.0f} s after {kill.victims} was killed"
            process.kill()
    survived_s = time.monotonic() - at
    for status, out, err in command.end_all(processes):
        assert status in RESTARTED, (kill, status, out, err)
    return Fallen(moment, kill.victims, survived_s, start_up_s)


def campaign(expected: Whole, workdir: pathlib.Path, kills: int, seed: int) -> list[Fallen]:
    """Kills the run of `expected` `kills` times, lets it end, and compares. Returns where the kills fell."""
    fallen, start_up_s = [], expected.start_up_s
    for kill in plan(kills, seed):
        if runs.newest_checkpoint(workdir) > expected.steps - 4 * SAVE_EVERY:  # it must not end before the last kill
            kill = kill._replace(moment="start-up")
        fallen.append(killed(expected.line, workdir, kill, start_up_s))
        start_up_s = fallen[-1].start_up_s  # the first run compiled
        print(*fallen[-1][:3], f"newest checkpoint {runs.newest_checkpoint(workdir)}", sep="\t", flush=True)
    to_the_end(expected.line, workdir)
    assert_same_end(workdir, expected)
    return fallen


def assert_same_end(workdir: pathlib.Path, expected: Whole, batch_size: int = 8) -> None:
    """`workdir` ended as `expected` did, having read every row of every global batch, and left nothing temporary."""
    runs.assert_identical(workdir, expected.workdir)
    read = runs.examples(workdir)
    assert read == runs.examples(expected.workdir)
    assert read.keys() == set(range(1, expected.steps + 1))
    assert all(rows.keys() == set(range(batch_size)) for rows in read.values())
    assert runs.leftovers(workdir) == []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", choices=runs.SOURCES, default="mixture")
    parser.add_argument("--folder", type=pathlib.Path)
    given = parser.parse_args()
    folder, began = given.folder or pathlib.Path(tempfile.mkdtemp()), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    expected = whole(folder, given.source, given.kills)
    fallen = campaign(expected, folder / "killed", given.kills, given.seed)
    for (moment, victims), n in sorted(collections.Counter((f.moment, f.victims) for f in fallen).items()):
        print(f"{n:>4} kills of {victims} during {moment}")
    slowest = max((f.survived_s for f in fallen if f.moment != "start-up" and f.victims != "both"), default=0.0)
    print(f"identical after {len(fallen)} kills, {time.monotonic() - began:.0f} s;"
          f" the process that was left ended within {slowest:.1f} s")


if __name__ == "__main__":
    main()
