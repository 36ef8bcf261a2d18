"""What reading a file may cost: memory and time."""

import contextlib
import pathlib
import signal

MIB = 1 << 20


class Late(BaseException):
    """No Exception, so that no code under test takes it for one of its own."""


@contextlib.contextmanager
def within(*, mebibytes, seconds):
    """Fails if the process grows by more than this, for a moment even (C and Rust included), or takes longer."""
    def late(*_):
        raise Late(f"not done after {seconds} s")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is that of now
    resident = status("VmRSS")
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    grown = status("VmHWM") - resident
    assert grown <= mebibytes * MIB, f"{grown / MIB:.0f} MiB more than before"


def status(field):
    """Bytes of this process: VmRSS are in memory, VmHWM were at most."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) * 1024
