"""A run that hangs ends, and says where: every process writes the stacks of its threads."""

import faulthandler
import pathlib
import sys
import threading
import time

import jax

from sslx import distributed

HUNG = 4         # exit status
SLACK_S = 3600.0  # what compilation, an evaluation or a save may take more than a step
GRACE_S = 10.0   # after which even a process whose interpreter stands still ends


class Watchdog:
    """Ends all processes of a run when a step of one takes longer than `limit_s` (0: never).

    Each writes its stacks to its stderr and to `folder`/<process>.txt. The exit status is HUNG.
    """

    def __init__(self, limit_s: float, folder: pathlib.Path):
        self.limit_s, self.path = limit_s, folder / f"{jax.process_index()}.txt"
        self.closed = threading.Event()
        self.doing = ""
        if limit_s:
            self.feed("starting", SLACK_S)
            distributed.last_acts.append(lambda status: self.write_stacks() if status == HUNG else None)
            threading.Thread(target=self.watch, daemon=True).start()

    def feed(self, doing: str, extra_s: float = 0.0) -> None:
        """The run goes on with `doing`, which may take the limit and `extra_s`."""
        self.doing, self.allowed_s = doing, self.limit_s + extra_s
        self.deadline = time.monotonic() + self.allowed_s

    def watch(self) -> None:
        """In a thread."""
        pause_s = min(1.0, self.limit_s / 10)
        while not self.closed.wait(pause_s):
            if time.monotonic() > self.deadline:
                self.write_stacks()
                distributed.abort(HUNG, f"error: {self.doing} took longer than {self.allowed_s:.0f} s (run.hang_s)."
                                  f" Where each process stood is in {self.path.parent}")
            # A thread of C, for when no Python runs.
            faulthandler.dump_traceback_later(self.allowed_s + GRACE_S, exit=True)

    def write_stacks(self) -> None:
        """First to stderr: the file's disk may be what hangs."""
        faulthandler.dump_traceback_later(GRACE_S, exit=True)
        print(f"\nstacks of process {jax.process_index()}, {self.doing}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr)
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("w") as file:
            print(f"process {jax.process_index()}, {self.doing}, {time.strftime('%Y-%m-%d %H:%M:%S')}", file=file,
                  flush=True)
            faulthandler.dump_traceback(file)

    def close(self) -> None:
        self.closed.set()
        if self.limit_s:
            faulthandler.cancel_dump_traceback_later()
