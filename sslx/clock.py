"""Time and interruptions of a run."""

import collections
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from sslx import distributed


class Speed(NamedTuple):
    steps_per_s: float
    tokens_per_s: float


class Clock:
    """Wall time of the run; time and speed of its steps alone, without evaluations and saves."""

    def __init__(self, earlier_s: float):
        self.began, self.paused, self.paused_cpu = time.monotonic() - earlier_s, 0.0, 0.0
        self.marks: collections.deque[tuple[float, int, int]] = collections.deque(maxlen=50)

    def wall(self) -> float:
        """Seconds since the run began, those before it was resumed included."""
        return time.monotonic() - self.began

    def cpu(self) -> float:
        """CPU-seconds of this process in starting up and stepping."""
        return time.process_time() - self.paused_cpu

    def pause(self, action: Callable[[], None]) -> None:
        """Runs what is no step."""
        began, began_cpu = time.monotonic(), time.process_time()
        action()
        self.paused += time.monotonic() - began
        self.paused_cpu += time.process_time() - began_cpu

    def speed(self, step: int, tokens: int) -> Speed:
        """Over the last 50 steps, from the end of the first, which compiles."""
        self.marks.append((self.wall() - self.paused, step, tokens))
        (t0, s0, n0), (t1, s1, n1) = self.marks[0], self.marks[-1]
        return Speed((s1 - s0) / (t1 - t0), (n1 - n0) / (t1 - t0)) if t1 > t0 else Speed(0.0, 0.0)


class Interrupt:
    """Ctrl-C and SIGTERM ask the loop to save and stop; a second one stops at once.

    Of several processes the signal to one stops all after the same step: Ctrl-C is handed on as SIGTERM, on which
    `distributed` lets them agree. `step` is the one the loop starts from.
    """

    def __init__(self, step: int) -> None:
        self.asked, self.alone = False, jax.process_count() == 1
        if not self.alone:
            distributed.share_notices(step)
        try:
            numbers = (signal.SIGINT, signal.SIGTERM) if self.alone else (signal.SIGINT,)
            self.before = {s: signal.signal(s, self.ask) for s in numbers}
        except ValueError:  # not the main thread: whoever owns the signals decides
            self.before = {}

    def ask(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if not self.alone:
            signal.raise_signal(signal.SIGTERM)

    def stops_after(self, step: int) -> bool:
        """Whether to stop after this step; asked at every step."""
        return self.asked if self.alone else distributed.stops_after(step)

    def restore(self) -> None:
        """Gives the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
