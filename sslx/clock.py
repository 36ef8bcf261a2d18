"""Time and interruptions of a run."""

import collections
import math
import signal
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax

from sslx import distributed
from sslx.energy import Meter


class Speed(NamedTuple):
    steps_per_s: float
    tokens_per_s: float


ASIDE = ("eval", "save")  # not what the training itself takes
KINDS = ("start_up", "compile", "step", "data", "eval", "save", "lost")


class Clock:
    """Where the wall time of a run goes, in seconds, those before it was resumed included.

    start_up  importing, reading the config, opening the data, restoring.
    compile   tracing and compiling the step.
    step      the devices compute, or the host prepares them to.
    data      the devices wait for a batch.
    eval, save  evaluations and pictures; what of saving is not in the background.
    lost      spent on what was done again: after the checkpoint that a resume or a roll-back went on from.

    Every moment is charged to one of them, and so are CPU-seconds, and the joules that `meter` counts: `earlier_j` is
    NaN if unknown.
    """

    def __init__(self, earlier: Mapping[str, float], began: float, meter: Meter | None = None,
                 earlier_j: float = 0.0, earlier_cpu_s: float = 0.0):
        self.spent = {kind: float(earlier.get(kind, 0.0)) for kind in KINDS}
        self.cpu_aside, self.earlier_cpu_s = 0.0, earlier_cpu_s
        self.charged, self.charged_cpu = began, 0.0
        self.meter, self.energy_j = meter, earlier_j if meter else math.nan
        self.charged_j = meter() if meter else 0.0
        self.marks: collections.deque[tuple[float, int, int]] = collections.deque(maxlen=50)

    def charge(self, kind: str) -> None:
        """What has passed since the last charge was spent on `kind`."""
        now, cpu = time.monotonic(), time.process_time()
        self.spent[kind] += now - self.charged
        self.cpu_aside += cpu - self.charged_cpu if kind in ASIDE else 0.0
        self.charged, self.charged_cpu = now, cpu
        if self.meter:
            joules = self.meter()
            self.energy_j += 0.0 if kind in ASIDE else joules - self.charged_j
            self.charged_j = joules

    def rewind(self, spent: Mapping[str, float]) -> None:
        """From here on the account is `spent`, what was lost included."""
        self.spent |= spent
        self.charged = time.monotonic()
        self.marks.clear()

    def wall(self) -> float:
        """Seconds of the run."""
        return sum(self.spent.values()) + time.monotonic() - self.charged

    def cpu(self) -> float:
        """CPU-seconds of the run in starting up and stepping, of several processes at a time this one's."""
        return self.earlier_cpu_s + time.process_time() - self.cpu_aside

    def speed(self, step: int, tokens: int) -> Speed:
        """Over the last 50 steps, from the end of the first, which compiles."""
        self.charge("step")
        self.marks.append((self.spent["step"] + self.spent["data"], step, tokens))
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
