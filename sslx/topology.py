"""TPU slices and GPU clusters that are not here: what they are made of, and devices that any machine compiles for.

    topology("v5p:4x4x4")       one slice of 64 chips
    topology("2xv5e:16x16")     two slices of 256 chips, joined by the data centre's network (DCN)
    topology("h100:16x8")       16 hosts of 8 GPUs, joined by InfiniBand

A slice is what a fast network joins (ICI): the chips of a TPU slice, the GPUs of a host. DCN joins slices.
"""

import difflib
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import mesh_utils, topologies

from sslx.config import UserError
from sslx.flops import PEAKS


class Crossing(NamedTuple):
    """The links of a slice that a collective uses, by name, and its load on them.

    load: seconds that the busiest link works for each byte that a device sends, times its bandwidth.
    """

    load: float
    links: tuple[str, ...]


class Torus(NamedTuple):
    """Links between neighbours along some dimensions; `ring`: a length is closed if it is a multiple of this.

    Places are int[devices, 3]; `shape` is the whole slice's. A chip has links of its own in each direction: "x+".
    """

    dimensions: int
    ring: int

    def slice_of(self, device: Any) -> int:
        return getattr(device, "slice_index", 0) or 0

    def wrap(self, shape: Sequence[int]) -> tuple[bool, ...]:
        """Which of the three dimensions of a slice have wrap-around links.

        Three dimensions (v4, v5p, tpu7x): optical switches join whole cubes of 4 x 4 x 4 chips, so all or none.
        Two (v5e, v6e): the wires of a pod's full side of 16 end where they begin; shorter sides are cut out of it.
        """
        whole = [n % self.ring == 0 for n in shape[:self.dimensions]]
        return (all(whole),) * 3 if self.dimensions == 3 else (*whole, False)

    def ways(self, places: np.ndarray, shape: Sequence[int]) -> dict[int, tuple[int, int]]:
        """The dimensions along which a group lies: its length and the ways out of a chip, both round if it closes."""
        spans = {d: len(np.unique(places[:, d])) for d in range(3) if np.ptp(places[:, d])}
        return {d: (span, 2 if self.wrap(shape)[d] and span == shape[d] else 1) for d, span in spans.items()}

    def gather(self, places: np.ndarray, shape: Sequence[int]) -> Crossing:
        """What passes around all of a group. One that spans several dimensions uses the links of each."""
        ways = self.ways(places, shape)
        return Crossing(1 / sum(n for _, n in ways.values()), both_ways(ways))

    def exchange(self, places: np.ndarray, shape: Sequence[int]) -> Crossing:
        """What each device of a group has for each other (all-to-all).

        Half of all data crosses the cut through the middle of the longest dimension: of what each device of a row
        across it holds, a quarter each way, over one link, or two where the ring closes behind.
        """
        n, ways = len(places), self.ways(places, shape)
        return Crossing(max(span / (4 * links) for span, links in ways.values()) * n / (n - 1), both_ways(ways))

    def shift(self, sources: np.ndarray, targets: np.ndarray, shape: Sequence[int]) -> Crossing:
        """A permutation: a link carries as many transfers, one way, as the longest has hops along a dimension."""
        hops = targets - sources
        around = hops - np.sign(hops) * np.asarray(shape)  # the other way round
        hops = np.where(self.wrap(shape) & (abs(around) < abs(hops)), around, hops)
        links = tuple(f"{'xyz'[d]}{way}" for d in range(3) for way, sign in (("+", 1), ("-", -1))
                      if (sign * hops[:, d] > 0).any())
        return Crossing(int(abs(hops).max()), links)


def both_ways(dimensions: Iterable[int]) -> tuple[str, ...]:
    return tuple(f"{'xyz'[d]}{way}" for d in dimensions for way in "+-")


class Switch(NamedTuple):
    """A switch that all GPUs of a host can send through at once, each at the rate of its own links (NVLink)."""

    def slice_of(self, device: Any) -> int:
        return device.process_index

    def gather(self, places: np.ndarray, shape: Sequence[int]) -> Crossing:
        return Crossing(1, ("nvlink",))

    def exchange(self, places: np.ndarray, shape: Sequence[int]) -> Crossing:
        return Crossing(1, ("nvlink",))

    def shift(self, sources: np.ndarray, targets: np.ndarray, shape: Sequence[int]) -> Crossing:
        return Crossing(1, ("nvlink",))


class Compiler(NamedTuple):
    """What compiles for a platform without a device of it.

    platform:   as `get_topology_desc` and `lower` know it.
    packages:   that bring it; one of them will do.
    extra:      of sslx, that installs it.
    control:    options that turn off what hides latencies.
    options:    (generation, shape, slices) -> options of `get_topology_desc`.
    """

    platform: str
    packages: tuple[str, ...]
    extra: str
    control: dict[str, Any]
    options: Callable[["Generation", tuple[int, ...], int], dict[str, Any]]


class Generation(NamedTuple):
    """A kind of TPU or GPU. A device is what JAX calls one: a chip, or on tpu7x half of one.

    peak_flops:       dense bfloat16 FLOP/s of a device.
    hbm_bytes:        memory of a device that a program can have.
    hbm_bytes_s:      its bandwidth.
    ici_bytes_s:      one way: a link between neighbouring chips, all NVLinks of a GPU.
    dcn_bytes_s:      the network cards of one host, one way.
    shapes:           the slices there are, in chips; of GPUs hosts x GPUs a host.
    links:            how ICI joins the devices of a slice.
    overlap:          compiler options that let communication run beside computation.
    details:          what the compiler is told besides.
    """

    name: str
    device_kind: str
    peak_flops: float
    hbm_bytes: int
    hbm_bytes_s: float
    ici_bytes_s: float
    dcn_bytes_s: float
    shapes: tuple[str, ...]
    links: Torus | Switch
    compiler: Compiler
    overlap: dict[str, Any]
    devices_per_chip: int = 1
    chips_per_host: int = 4
    details: dict[str, Any] = {}  # noqa: RUF012

    @property
    def devices_per_host(self) -> int:
        return self.devices_per_chip * self.chips_per_host


def libtpu_options(generation: Generation, shape: tuple[int, ...], slices: int) -> dict[str, Any]:
    assert isinstance(generation.links, Torus)
    # Without these libtpu asks a metadata server for a TPU that is not there, and a second process aborts on a lock.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = dict(generation.details, topology_name=f"{generation.name}:{'x'.join(map(str, shape))}",
                   wrap=generation.links.wrap(shape))  # without it the torus is left open
    if slices > 1:
        options["num_slices"] = slices
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    return options


MEMORY_FRACTION = 0.75  # of a GPU's memory, that JAX reserves (XLA_PYTHON_CLIENT_MEM_FRACTION)


def cuda_options(generation: Generation, shape: tuple[int, ...], slices: int) -> dict[str, Any]:
    """The GPU as text of XLA's GpuTargetConfigProto, in the fields that change what is compiled."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # which asks a driver for its version
    device = dict(generation.details, memory_bandwidth=int(generation.hbm_bytes_s),
                  device_memory_size=int(generation.hbm_bytes / MEMORY_FRACTION),
                  threads_per_warp=32, block_dim_limit_x=2**31 - 1, registers_per_block_limit=2**16,
                  shared_memory_per_block=48 * 2**10)
    fields = " ".join(f"{name}: {value}" for name, value in device.items())
    return dict(topology="x".join(map(str, (slices, *shape))),
                target_config=f'gpu_device_info {{ {fields} }} platform_name: "CUDA"'
                              f' device_description_str: "{generation.device_kind}"')


LIBTPU = Compiler("tpu", ("libtpu",), "tpu", {"xla_tpu_enable_latency_hiding_scheduler": False}, libtpu_options)
CUDA = Compiler("cuda", ("jax_cuda13_plugin", "jax_cuda12_plugin"), "cuda13",
                {"xla_gpu_enable_latency_hiding_scheduler": False,  # alone it leaves some beside by chance
                 "xla_gpu_disable_async_collectives": "ALLCOLLECTIVES"}, cuda_options)


# Collectives move to the SparseCores, which the chip's matrix units do not wait for. Without the 2d, 3d and nd ones a
# group that spans several dimensions of the torus stays behind.
SPARSE_CORE = {f"xla_tpu_enable_sparse_core_collective_offload_{kind}": True for kind in
               ("all_gather", "2d_all_gather", "3d_all_gather", "reduce_scatter", "nd_reduce_scatter", "all_reduce")}

# v5e has no SparseCores: a gather is cut into steps fused with the products around it. v5p and v6e refuse these.
FUSED_STEPS = {name: True for name in (
    "xla_tpu_enable_async_collective_fusion", "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_enable_async_collective_fusion_multiple_steps", "xla_tpu_overlap_compute_collective_tc",
    "xla_enable_async_all_gather")}

# GPU: collectives are asynchronous by default, but of all only one at a time; with more, a layer's weights are under
# way while the gradients before it are. Pipelining over a loop's iterations (xla_gpu_pipeline_all_gather and its like
# in JAX 0.12, xla_gpu_enable_pipelined_all_gather in 0.10) hides more and has no one name.
CONCURRENT = {"xla_gpu_enable_latency_hiding_scheduler": True,
              "xla_gpu_experimental_parallel_collective_overlap_limit": 4}

CUBES, PODS = Torus(3, 4), Torus(2, 16)
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # parts of one cube
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
HOSTS = ("1x1", "1x2", "1x4", *(f"{hosts}x8" for hosts in range(1, 513)))  # of 8 GPUs, or parts of one
GIB = 2**30

# Peaks, bandwidths and shapes from cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x), of the larger slices the
# common ones. hbm_bytes is what libtpu calls "available HBM" when a program does not fit. ICI: the sheets' numbers
# (v5p: 1200 GB/s a chip over 6 links and both ways) less the tenth that no program gets. DCN: the sheets' rates per
# chip (v5e 25, v5p 50, v6e and tpu7x 100 Gbit/s) times 4; v4 is on no sheet and assumed to be as v5p.
GENERATIONS = {g.name: g for g in (
    Generation("v4", "TPU v4", PEAKS["TPU v4"], int(30.75 * GIB), 1200e9, 4.5e10, 25e9,
               (*SMALL, "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x12", "8x8x16", "8x16x16", "12x16x16"), CUBES, LIBTPU,
               {},  # SPARSE_CORE is accepted and makes nothing asynchronous
               details={"chip_config_name": "megacore"}),  # one device a chip, as JAX has it on a real v4
    Generation("v5e", "TPU v5 lite", PEAKS["TPU v5 lite"], int(15.75 * GIB), 819e9, 4.5e10, 12.5e9,
               FLAT, PODS, LIBTPU, FUSED_STEPS),
    Generation("v5p", "TPU v5", PEAKS["TPU v5"], int(95.73 * GIB), 2765e9, 9e10, 25e9,
               (*SMALL, "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x8x12", "8x8x8", "8x8x12", "8x8x16", "8x16x16",
                "16x16x16", "16x16x24"), CUBES, LIBTPU, SPARSE_CORE),
    Generation("v6e", "TPU v6 lite", PEAKS["TPU v6 lite"], int(31.24 * GIB), 1638e9, 9e10, 50e9,
               FLAT, PODS, LIBTPU, SPARSE_CORE),
    Generation("tpu7x", "TPU7x", PEAKS["TPU7x"], int(94.74 * GIB), 7380e9 / 2, 9e10, 50e9,
               (*SMALL, "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24", "16x24x24"),
               CUBES, LIBTPU, {},  # asynchronous by default
               devices_per_chip=2),
)}


def gpu(name: str, device_kind: str, gib: float, hbm_bytes_s: float, nvlink_bytes_s: float, dcn_bytes_s: float,
        capability: str, cores: int, lanes: int, ghz: float, cache_mib: float, shared_bytes: int) -> Generation:
    """A GPU in hosts of eight: its multiprocessors, float32 lanes of each, clock, L2 and shared memory of a block."""
    details = dict(cuda_compute_capability=f"{{ {capability} }}", core_count=cores, fpus_per_core=lanes,
                   clock_rate_ghz=ghz, l2_cache_size=int(cache_mib * 2**20), shared_memory_per_block_optin=shared_bytes)
    return Generation(name, device_kind, PEAKS[device_kind], int(MEMORY_FRACTION * gib * GIB), hbm_bytes_s,
                      nvlink_bytes_s, dcn_bytes_s, HOSTS, Switch(), CUDA, CONCURRENT, chips_per_host=8, details=details)


# Bandwidths from NVIDIA's data sheets of the A100, H100, H200 and DGX B200, NVLink's halved to one way; DCN: the eight
# ConnectX of a DGX (200 Gbit/s each with A100, else 400). NCCL gets less of both. Memory: what a driver shows as total.
# The rest from NVIDIA's architecture white papers, as a device tells its compiler.
HOPPER = "major: 9 feature_extension: ACCELERATED_FEATURES"
BLACKWELL = "major: 10 feature_extension: ACCELERATED_FEATURES"
GENERATIONS |= {g.name: g for g in (
    gpu("a100", "NVIDIA A100-SXM4-80GB", 79.25, 2039e9, 300e9, 200e9, "major: 8", 108, 64, 1.41, 40, 163 * 1024),
    gpu("h100", "NVIDIA H100 80GB HBM3", 79.1, 3350e9, 450e9, 400e9, HOPPER, 132, 128, 1.98, 50, 227 * 1024),
    gpu("h200", "NVIDIA H200", 139.8, 4800e9, 450e9, 400e9, HOPPER, 132, 128, 1.98, 50, 227 * 1024),
    gpu("b200", "NVIDIA B200", 178.3, 8000e9, 900e9, 400e9, BLACKWELL, 148, 128, 1.965, 126.5, 227 * 1024),
)}


class Topology(NamedTuple):
    """So many slices of one shape, and their devices, the slices one after the other."""

    name: str
    generation: Generation
    shape: tuple[int, ...]
    slices: int
    devices: list[Any]


def topology(name: str, slices: int = 1) -> Topology:
    """The devices of "v5p:4x4x4", or of two such slices: "2xv5p:4x4x4", or `slices=2`.

    Raises UserError for a slice that nobody sells, naming the nearest ones, and if its compiler is not installed.
    """
    known = [f"{g.name}:{shape}" for g in GENERATIONS.values() for shape in g.shapes]
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*:[\dx]+)", name)
    prefix, one = match.groups() if match else (None, name)
    if one not in known:
        raise UserError(f"topology {name!r} does not exist: it takes a slice that can be booked, or several as in"
                        f" 2x{known[0]}, or GPUs as in h100:16x8; the nearest are {', '.join(nearest(one, known))}")
    if prefix and slices not in (1, int(prefix)):
        raise UserError(f"topology {name!r} says {prefix} slices and slices={slices}; give the number once")
    slices = int(prefix or slices)
    if slices < 1:
        raise UserError(f"topology {name!r} has {slices} slices; it takes at least one")
    generation = GENERATIONS[one.split(":")[0]]
    shape = tuple(map(int, one.split(":")[1].split("x")))
    return Topology(name if prefix or slices == 1 else f"{slices}x{one}", generation, shape, slices,
                    compile_only(generation, one, shape, slices))


def nearest(name: str, known: list[str]) -> list[str]:
    """The three slices closest in spelling, of the same generation if there is one of that name."""
    same = [k for k in known if k.split(":")[0] == name.split(":")[0]]
    return difflib.get_close_matches(name, same or known, n=3, cutoff=0)


def overlap(devices: Sequence[Any] | np.flatiter) -> dict[str, Any]:
    """Compiler options that let communication run beside computation; none for a single device or an unknown kind."""
    known = {generation.device_kind: generation.overlap for generation in GENERATIONS.values()}
    return known.get(devices[0].device_kind, {}) if len(devices) > 1 else {}


def compile_only(generation: Generation, name: str, shape: tuple[int, ...], slices: int) -> list[Any]:
    """Devices that programs can be compiled for and not run on."""
    compiler = generation.compiler
    if not any(map(importlib.util.find_spec, compiler.packages)):
        raise UserError(f"compiling for {name} needs the {compiler.platform.upper()} compiler, which runs on any Linux"
                        f' machine: pip install "sslx[{compiler.extra}]"')
    options = compiler.options(generation, shape, slices)
    return topologies.get_topology_desc(platform=compiler.platform, **options).devices


def arrange(shape: Sequence[int], devices: Sequence[Any], slices: int = 1) -> np.ndarray:
    """Devices as an array of a mesh's shape, each axis of it along whole dimensions of the torus.

    A group of devices along an axis then has rings of its own, which no other group's traffic crosses. Over several
    slices the first axis is the one that crosses them. CPUs and GPUs keep their order.

    Raises UserError if the axes are no products of whole dimensions, or the first is no multiple of the slices.
    """
    wanted = "x".join(map(str, shape))
    if math.prod(shape) != len(devices):
        raise UserError(f"a mesh of {wanted} takes {math.prod(shape)} devices; there are {len(devices)}")
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    if shape[0] % slices:
        raise UserError(f"mesh {wanted} over {slices} slices: the first axis (data) crosses them and must be a multiple"
                        f" of {slices}; it is {shape[0]}")
    inner = (shape[0] // slices, *shape[1:])
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(inner, devices)
        return mesh_utils.create_hybrid_device_mesh(inner, (slices, *[1] * (len(shape) - 1)), devices)
    except NotImplementedError:
        torus = tuple(int(n) for n in np.ptp([d.coords for d in devices], axis=0) + 1)
        sizes = {math.prod(part) for k in range(4) for part in itertools.combinations(torus, k)}
        raise UserError(f"mesh {'x'.join(map(str, inner))} does not lie on a slice of {'x'.join(map(str, torus))}: each"
                        " axis must be a product of whole dimensions, each used once;"
                        f" sizes that can be are {', '.join(map(str, sorted(sizes)))}") from None
