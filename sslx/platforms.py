"""What is set for a platform before JAX starts its backend, in one place, each with its reason.

A variable that the user has set wins; `SSLX_FLAGS=off` sets nothing. Must run before JAX looks for devices.
"""

import ctypes
import gc
import glob
import os
import pathlib
import sys

# Without the first, bf16 products of the backward pass run on one slow path; both together make a bf16
# training step 2.4 to 2.6 times faster (6 layers, 384 wide, AVX512-BF16). The last lets barriers stay until operations
# are fused; without them the gradient of the residual stream is computed again for each layer's transposed copy of it.
# What compiles a small loop in one piece knows no barriers, and from JAX 0.12 loops of 4 MB are small.
CPU_FLAGS = ("--xla_cpu_experimental_onednn_custom_call=true", "--xla_cpu_experimental_ynn_fusion_type=-reduce",
             "--xla_disable_hlo_passes=cse_barrier_expander,small-while-loop-hoisting")
# mallopt: one heap, nothing by mmap, nothing given back. Every step frees its buffers and asks for them again; as
# glibc does it the kernel clears their pages each time, a quarter of the time of a step of 2 GFLOP. -1 is no bound.
MALLOC = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}
# Python looks for garbage in cycles after so many new objects, not 700, and leaves the libraries' own out: to trace a
# network makes a million, and the search is a tenth of the time of a start.
COLLECTION = (50_000, 20, 50)
# Overlaps collectives with compute.
GPU_FLAGS = ("--xla_gpu_enable_latency_hiding_scheduler=true",)


def detect() -> str:
    """The platform JAX will use: what JAX_PLATFORMS says, else what devices the machine shows."""
    if asked := os.environ.get("JAX_PLATFORMS"):
        return asked.split(",")[0]
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return "tpu"
    return "cuda" if glob.glob("/dev/nvidia[0-9]*") else "cpu"


def prepare() -> str:
    """Sets the environment and the allocator for the platform and returns a line that says what was set."""
    if os.environ.get("SSLX_FLAGS") == "off":
        return "platform flags left alone (SSLX_FLAGS=off)"
    platform = detect()
    if not gc.get_freeze_count():  # once: garbage that is frozen stays
        gc.freeze()
    gc.set_threshold(*COLLECTION)
    said = [f"gc.set_threshold{COLLECTION}"]
    if platform == "cpu" and "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"  # spares a second of probing for accelerators
        if jax := sys.modules.get("jax"):    # which has read it already
            jax.config.update("jax_platforms", "cpu")
        said.append("JAX_PLATFORMS=cpu")
    if platform == "cpu" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):  # glibc has it
        said += [f"{name}={value}" for name, (number, value) in MALLOC.items() if mallopt(number, value)]
    present = os.environ.get("XLA_FLAGS", "")
    flags = {"cpu": CPU_FLAGS, "cuda": GPU_FLAGS, "gpu": GPU_FLAGS}.get(platform, ())
    added = [flag for flag in flags if flag.split("=")[0] not in present]
    if added:
        os.environ["XLA_FLAGS"] = " ".join([present, *added]).strip()
        said.append("XLA_FLAGS+=" + " ".join(added))
    return f"{platform}: {'; '.join(said)} (SSLX_FLAGS=off sets nothing)"


def enable_compilation_cache() -> pathlib.Path:
    """Keeps compiled programs on disk, under JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    import jax

    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "sslx" / "jax"
    path = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", default))
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
