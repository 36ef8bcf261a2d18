"""Eight simulated devices for every test, and quick rather than fast programs; set before JAX starts."""

import gc
import os
import shutil
import sys
import tempfile

import command
import pytest

os.environ |= command.environment(devices=8)
# What a test compiles, no other compiles again: neither another worker nor a process that a test starts.
if MADE := "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sslx-tests-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# What is traced stays: looking through all of it for cycles takes a tenth of the time.
gc.set_threshold(100_000, 50, 100)


def pytest_unconfigure():
    if MADE:
        shutil.rmtree(os.environ.pop("JAX_COMPILATION_CACHE_DIR"), ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """What a module compiled is of no use to the next, and takes gigabytes in the end."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def quick_compilation():
    """Without most of JAX's optimizations too."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
