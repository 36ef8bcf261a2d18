"""Eight simulated devices for every test, and quick rather than fast programs; set before JAX starts."""

import os

import command
import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {command.QUICK}"


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where the processes that tests start keep compiled programs: one folder for all workers of a session."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache"


@pytest.fixture(scope="module")
def quick_compilation():
    """Without most of JAX's optimizations too."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
