"""Runs `python -m sslx.main` as a process of its own, as a user does."""

import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
# Quick rather than fast programs, where nearly all of the time is compilation. --xla_cpu_use_fusion_emitters=false
# would take half of that away, but compiles image views wrongly (JAX 0.10.2).
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def environment(devices: int = 1, **variables: str) -> dict[str, str]:
    """Variables of a process on `devices` simulated devices; compiled programs are shared (conftest.py)."""
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | variables


def start(*flags: object, devices: int = 1, file_bytes: int | None = None,
          variables: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Starts the command on `devices` simulated devices.

    file_bytes: no file may grow beyond it, which to the writer looks like a full disk.
    """

    def limit():
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return subprocess.Popen([sys.executable, "-m", "sslx.main", *map(str, flags)], cwd=ROOT, text=True,
                            env=environment(devices, **(variables or {})), preexec_fn=limit,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_all(n: int, *flags: object, devices: int = 2) -> list[subprocess.Popen]:
    """Starts the `n` processes of one run, with `devices` simulated devices each."""
    port = free_port()
    return [start(*flags, f"--coordinator=127.0.0.1:{port}", f"--processes={n}", f"--process={i}",
                  devices=devices) for i in range(n)]


def end_all(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """`end` of each process of one run; all must end by themselves."""
    try:
        return [end(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a process that was started."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def run(*flags: object, **options) -> tuple[int, str, str]:
    return end(start(*flags, **options))


def wait(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    """Until `condition` holds; the process must not end before."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def variant(folder: pathlib.Path, name: str, edit: str) -> pathlib.Path:
    """A config file: the debug variant of configs/<name>.py, changed by the statements `edit` on `config`."""
    path = folder / f"{name}_variant.py"
    path.write_text(f"""import runpy

def get_config():
    config = runpy.run_path({str(CONFIGS / (name + ".py"))!r})["get_config"]("debug")
    {edit}
    return config
""")
    return path


def kill(line: Iterable[object], workdir: pathlib.Path, condition: Callable[[], bool]) -> None:
    """Starts a run and sends it SIGKILL as soon as `condition` holds."""
    process = start(*line, "--workdir", workdir)
    wait(process, condition)
    process.kill()
    assert end(process)[0] == -signal.SIGKILL
