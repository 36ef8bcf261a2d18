"""Energy, where the hardware tells: of GPUs through NVML, of CPUs through RAPL."""

import contextlib
import os
import pathlib
from collections.abc import Callable

import jax

POWERCAP = pathlib.Path("/sys/class/powercap")

Meter = Callable[[], float]  # joules, from where it pleases to count


def meter() -> Meter | None:
    """Counts the joules of this process's GPUs, or of the machine's CPUs if it computes there alone; None if unknown.

    RAPL does not tell programs apart: what others do on the CPUs counts too.
    """
    match jax.default_backend():
        case "gpu":
            return nvml([device.local_hardware_id for device in jax.local_devices()])
        case "cpu" if jax.process_count() == 1:
            return rapl(POWERCAP)
    return None


class Counter:
    """Joules of a RAPL domain since this was made; to be read more often than the hardware's counter wraps around."""

    def __init__(self, domain: pathlib.Path):
        self.path, self.range_uj = domain / "energy_uj", int((domain / "max_energy_range_uj").read_text())
        self.last_uj, self.total_uj = int(self.path.read_text()), 0

    def __call__(self) -> float:
        now_uj = int(self.path.read_text())
        self.total_uj += (now_uj - self.last_uj) % (self.range_uj + 1)
        self.last_uj = now_uj
        return self.total_uj / 1e6


def rapl(folder: pathlib.Path) -> Meter | None:
    """Joules of all CPU packages and their memory, in `folder` of the kernel; None if they are not, or not readable."""
    counters = []
    try:
        for domain in folder.glob("intel-rapl:*"):  # AMD's too; cores are in their package, "psys" is all of them
            if (domain / "name").read_text().startswith(("package", "dram")):
                counters.append(Counter(domain))
    except (OSError, ValueError):  # only root may read them on many machines
        return None
    return (lambda: sum(counter() for counter in counters)) if counters else None


def nvml(devices: list[int]) -> Meter | None:
    """Joules of GPUs by their numbers among those that CUDA sees; None without nvidia-ml-py or a driver that tells."""
    try:
        import pynvml
    except ImportError:
        return None
    with contextlib.suppress(pynvml.NVMLError, IndexError, ValueError):
        pynvml.nvmlInit()
        shown = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(pynvml.nvmlDeviceGetCount())))
        names = [shown.split(",")[device].strip() for device in devices]
        handles = [pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else
                   pynvml.nvmlDeviceGetHandleByUUID(name) for name in names]

        def joules() -> float:
            return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1e3

        joules()
        return joules
    return None
