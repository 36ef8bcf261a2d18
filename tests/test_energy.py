"""Joules as the kernel's files tell them; nothing where they do not."""

import math
import time

import pytest

from sslx import energy
from sslx.clock import Clock


def write(folder, domain: str, name: str, energy_uj: int, range_uj: int = 999_999_999) -> None:
    (folder / domain).mkdir(exist_ok=True)
    for file, value in {"name": name, "energy_uj": energy_uj, "max_energy_range_uj": range_uj}.items():
        (folder / domain / file).write_text(f"{value}\n")


@pytest.fixture
def powercap(tmp_path):
    """Two packages with their memory and cores, as Linux shows them: all domains side by side."""
    (tmp_path / "intel-rapl").mkdir()
    for n in range(2):
        write(tmp_path, f"intel-rapl:{n}", f"package-{n}", 1_000_000)
        write(tmp_path, f"intel-rapl:{n}:0", "core", 5)
        write(tmp_path, f"intel-rapl:{n}:1", "dram", 7)
    write(tmp_path, "intel-rapl:2", "psys", 3)
    write(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000)
    return tmp_path


def test_packages_and_memory_are_summed_and_nothing_is_counted_twice(powercap):
    meter = energy.rapl(powercap)
    assert meter() == 0
    for domain, name, uj in (("intel-rapl:0", "package-0", 4_000_000), ("intel-rapl:1", "package-1", 2_500_000),
                             ("intel-rapl:0:0", "core", 9_000_000), ("intel-rapl:1:1", "dram", 500_007),
                             ("intel-rapl:2", "psys", 10**8), ("intel-rapl-mmio:0", "package-0", 4_000_000)):
        write(powercap, domain, name, uj)
    assert meter() == pytest.approx(3 + 1.5 + 0.5)


def test_a_counter_that_wraps_around_goes_on(powercap):
    write(powercap, "intel-rapl:0", "package-0", 999_000_000)
    meter = energy.rapl(powercap)
    for uj, joules in ((999_999_999, 0.999999), (2_000_000, 3.0), (999_999_999, 1000.999999), (0, 1001.0)):
        write(powercap, "intel-rapl:0", "package-0", uj)
        assert meter() == pytest.approx(joules, abs=1e-9)


def test_what_does_not_tell_is_absent(powercap, tmp_path):
    assert energy.rapl(tmp_path / "nowhere") is None
    (powercap / "intel-rapl:0" / "energy_uj").unlink()
    assert energy.rapl(powercap) is None
    assert math.isnan(Clock({}, time.monotonic(), None).energy_j)


def test_energy_of_evaluations_and_saves_is_not_of_the_training(powercap):
    meter = energy.rapl(powercap)
    clock = Clock({}, time.monotonic(), meter, earlier_j=100.0)
    for kind, uj in (("start_up", 2_000_000), ("step", 5_000_000), ("eval", 11_000_000), ("save", 12_000_000),
                     ("data", 12_500_000)):
        write(powercap, "intel-rapl:0", "package-0", uj)
        clock.charge(kind)
    assert clock.energy_j == pytest.approx(100 + 1 + 3 + 0.5)


def test_nvml_without_a_driver_tells_nothing():
    pytest.importorskip("pynvml")
    assert energy.nvml([10**6]) is None
