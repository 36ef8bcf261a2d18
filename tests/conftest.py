"""Eight simulated devices for every test, and quick rather than fast programs; set before JAX starts."""

import gc
import os
import re
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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """What tests of a module compile and prepare is shared: they run in one process.

    Of `test_contract`, which is long, those of a config do.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            module, _, test = nodeid.partition("::")
            of_config = re.search(r"\[([a-z]\w+)", test)
            return f"{module}::{of_config[1]}" if of_config and module.endswith("test_contract.py") else module

    return ByModule(config, log)


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
