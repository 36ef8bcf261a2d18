"""Runs as processes of this machine: several at once where there is room, each of them resumable."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sslx import log, manifest, workdir
from sslx.config import UserError

POLL_S = 0.2
PROGRAM_BYTES = 2**30  # of a process before it holds any state
COPIES = 4             # of the state while it is trained: gradients, activations, a checkpoint being saved


class Job(NamedTuple):
    """A run to be done: `steps` of the config file, in the workdir.

    needs:       a checkpoint of another run that must be there before.
    state_bytes: of parameters and optimizer.
    """

    config: pathlib.Path
    workdir: pathlib.Path
    steps: int
    needs: pathlib.Path | None = None
    state_bytes: int = 0

    @property
    def name(self) -> str:
        return self.workdir.name

    @property
    def output(self) -> pathlib.Path:
        return self.workdir / "output.txt"


def finished(job: Job) -> bool:
    """Whether the log ends with an evaluation of the annealed run, and nobody was killed while writing."""
    if not (job.workdir / "metrics.jsonl").exists() or (job.workdir / workdir.LOCK).exists():
        return False
    last = {p["split"]: p for p in log.read(job.workdir)[1] if p["step"] == job.steps}
    return set(last) == {"train", "eval"} and last["eval"].get("phase") == "annealed"


def command(job: Job) -> list[str]:
    return [sys.executable, "-m", "sslx.main", "--config", str(job.config), "--workdir", str(job.workdir)]


def start(job: Job, cores: Sequence[int] = ()) -> subprocess.Popen:
    """The process of a run, on `cores` if there are any; what it says is added to W/output.txt."""
    job.workdir.mkdir(parents=True, exist_ok=True)
    with job.output.open("ab") as output:
        # In a session of its own: Ctrl-C reaches it through `all_of` alone, once.
        process = subprocess.Popen(command(job), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   start_new_session=True)
    if cores:
        os.sched_setaffinity(process.pid, cores)  # long before it starts threads, which inherit it
    return process


class Ended(NamedTuple):
    """failed: {run: why}. stopped: whether somebody asked for it."""

    failed: dict[str, str]
    stopped: bool


class Running(NamedTuple):
    job: Job
    process: subprocess.Popen
    began: float


def all_of(jobs: Sequence[Job], at_once: int, say: Callable[[str], None]) -> Ended:
    """Does all jobs in their order, as far as what they need is there, and goes on past those that fail.

    Ctrl-C or SIGTERM asks every process to save and stop, a second one to stop at once.
    """
    asked: list[int] = []
    before = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return attend(list(jobs), at_once, asked, say)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def attend(waiting: list[Job], at_once: int, asked: list[int], say: Callable[[str], None]) -> Ended:
    """Starts what can be started and ends what has ended, until nothing is left; `asked` grows with every signal."""
    failed: dict[str, str] = {}
    running: dict[int, Running] = {}  # by the place among those at once
    told: set[str] = set()
    passed_on = 0
    while running or (waiting and not asked):
        for _ in range(len(asked) - passed_on):
            for one in running.values():
                one.process.send_signal(signal.SIGINT)
            passed_on += 1
        for place, one in list(running.items()):
            if one.process.poll() is not None:
                del running[place]
                why = outcome(one, bool(asked), say)
                failed |= {one.job.name: why} if why else {}
        todo = {job.workdir for job in waiting} | {one.job.workdir for one in running.values()}
        for job in [] if asked else list(waiting):
            free = [place for place in range(at_once) if place not in running]
            if job.needs is not None and not (job.needs / manifest.NAME).exists():
                if job.needs.parent.parent not in todo:
                    waiting.remove(job)
                    failed[job.name] = f"there is no {job.needs} to branch from"
                    say(f"{job.name}: not started, {failed[job.name]}")
            elif free and (room(job) or not running):
                if owner := written_by_another(job):
                    if job.name not in told:
                        say(f"{job.name}: waits, {owner}")
                    told.add(job.name)
                    continue
                waiting.remove(job)
                running[free[0]] = Running(job, start(job, cores_of(free[0], at_once)), time.monotonic())
                say(f"{job.name}: started")
        time.sleep(POLL_S)
    return Ended(failed, bool(asked))


def outcome(one: Running, asked: bool, say: Callable[[str], None]) -> str:
    """Says how a run ended; why it failed, "" if it did not."""
    name, took, status = one.job.name, f"after {time.monotonic() - one.began:.0f} s", one.process.returncode
    if status == 0:
        say(f"{name}: finished {took}{result(one.job)}")
    elif asked:
        say(f"{name}: stopped {took}")
    else:
        why = f"status {status}: {reason(one.job)}"
        say(f"{name}: failed {took}, {why}")
        return why
    return ""


def written_by_another(job: Job) -> str:
    """Which other process trains in the workdir, such as one that outlived a killed sweep; "" if none that lives."""
    try:
        if (job.workdir / workdir.LOCK).exists():
            workdir.take_over(job.workdir / workdir.LOCK)
    except UserError as error:
        return str(error)
    return ""


def cores_of(place: int, at_once: int) -> list[int]:
    """The cores of the n-th of several processes at once: equal shares; none where they cannot be told."""
    if at_once == 1 or not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // at_once
    return cores[place * share:(place + 1) * share]


def room(job: Job) -> bool:
    """Whether the memory that is free now takes another run."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return True
    free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return free is None or free > PROGRAM_BYTES + COPIES * job.state_bytes


def result(job: Job) -> str:
    """The held-out loss a run ended with, for people."""
    losses = [p["metrics"].get("heldout/loss") for p in log.read(job.workdir)[1] if p["split"] == "eval"]
    return f", heldout/loss {losses[-1]:.4f}" if losses and losses[-1] is not None else ""


def reason(job: Job) -> str:
    """What a run that failed said last."""
    said = [line for line in job.output.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("error: ")]
    return f"{(errors or said or ['nothing was said'])[-1]} (see {job.output})"
