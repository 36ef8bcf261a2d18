"""Eight simulated devices for every test, and quick rather than fast programs; set before JAX starts."""

import os

FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Nearly all of a test's time is compilation.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS))
