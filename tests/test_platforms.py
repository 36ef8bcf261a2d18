"""What is set before JAX starts, seen from a process that has set it."""

import os
import subprocess
import sys

import pytest
from experiments import ROOT

TOUCHED = """
import resource, sys
from sslx import platforms
print(platforms.prepare())
for i in range(4):
    if i == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * int(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
@pytest.mark.parametrize("size", [40_000_000, 2_200_000_000])  # glibc's own bounds are 32 MiB and, as an int, 2 GiB
def test_memory_that_is_asked_for_again_costs_no_page_faults(size):
    """Of the same program without: all pages, each time."""
    def faults(**variables: str) -> int:
        done = subprocess.run([sys.executable, "-c", TOUCHED, str(size)], cwd=ROOT, check=True, text=True,
                              capture_output=True, env=os.environ | {"JAX_PLATFORMS": "cpu"} | variables)
        said = done.stdout.splitlines()
        assert ("M_MMAP_MAX=0" in said[0]) == ("SSLX_FLAGS" not in variables)
        return int(said[1])

    assert faults() < 100
    assert faults(SSLX_FLAGS="off") > 2 * size / 4096 / 2


BARRED = """
from sslx import platforms
platforms.prepare()
import jax
from jax import numpy as jnp
def barred(x):
    return jnp.sin(jax.lax.optimization_barrier(jnp.cos(x)))
print(*["opt-barrier" in jax.jit(f).lower(jnp.ones(8)).compile().as_text() for f in (
    barred, lambda x: jax.lax.fori_loop(0, 9, lambda i, x: barred(x), x))])
"""


def test_barriers_stay_until_operations_are_fused():
    """In small loops too. XLA passes by a name it does not know in --xla_disable_hlo_passes without a word."""
    def stays(**variables: str) -> str:
        return subprocess.run([sys.executable, "-c", BARRED], cwd=ROOT, check=True, text=True, capture_output=True,
                              env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | variables).stdout.strip()

    assert (stays(), stays(SSLX_FLAGS="off")) == ("True True", "False False")
