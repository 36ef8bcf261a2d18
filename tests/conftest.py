"""Eight simulated devices for every test, and quick rather than fast programs; set before JAX starts."""

import os

import pytest

FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Nearly all of a test's time is compilation.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where the processes that tests start keep compiled programs: one folder for all workers of a session."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache"
