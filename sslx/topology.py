"""TPU slices that are not here: what they are made of, and their devices, for which libtpu compiles on any machine.

    topology("v5p:4x4x4")       one slice of 64 chips
    topology("2xv5e:16x16")     two slices of 256 chips, joined by the data centre's network (DCN)
"""

import difflib
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import mesh_utils, topologies

from sslx.config import UserError
from sslx.flops import PEAKS


class Generation(NamedTuple):
    """A kind of TPU. A device is what JAX calls one: a chip, or on tpu7x half of one.

    peak_flops:       dense bfloat16 FLOP/s of a device.
    hbm_bytes:        memory of a device that the compiler gives to a program.
    hbm_bytes_s:      its bandwidth.
    ici_bytes_s:      one link between neighbouring chips, one way.
    dcn_bytes_s:      the network cards of one host, one way.
    shapes:           the slices there are, in chips.
    ring:             a dimension has wrap-around links if it is a multiple of this.
    overlap:          compiler options that let communication run beside computation.
    options:          of `get_topology_desc`.
    """

    name: str
    device_kind: str
    peak_flops: float
    hbm_bytes: int
    hbm_bytes_s: float
    ici_bytes_s: float
    dcn_bytes_s: float
    shapes: tuple[str, ...]
    ring: int
    overlap: dict[str, bool]
    devices_per_chip: int = 1
    chips_per_host: int = 4
    options: dict[str, Any] = {}  # noqa: RUF012

    @property
    def torus_dimensions(self) -> int:
        return self.shapes[0].count("x") + 1

    @property
    def devices_per_host(self) -> int:
        return self.devices_per_chip * self.chips_per_host

    def wrap(self, shape: Sequence[int]) -> tuple[bool, ...]:
        """Which dimensions of a slice have wrap-around links.

        Three dimensions (v4, v5p, tpu7x): optical switches join whole cubes of 4 x 4 x 4 chips, so all or none.
        Two (v5e, v6e): the wires of a pod's full side of 16 end where they begin; shorter sides are cut out of it.
        """
        whole = [n % self.ring == 0 for n in shape]
        return (all(whole),) * 3 if len(shape) == 3 else tuple(whole)


# Collectives move to the SparseCores, which the chip's matrix units do not wait for. Without the 2d, 3d and nd ones a
# group that spans several dimensions of the torus stays behind.
SPARSE_CORE = {f"xla_tpu_enable_sparse_core_collective_offload_{kind}": True for kind in
               ("all_gather", "2d_all_gather", "3d_all_gather", "reduce_scatter", "nd_reduce_scatter", "all_reduce")}

# v5e has no SparseCores: a gather is cut into steps fused with the products around it. v5p and v6e refuse these.
FUSED_STEPS = {name: True for name in (
    "xla_tpu_enable_async_collective_fusion", "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_enable_async_collective_fusion_multiple_steps", "xla_tpu_overlap_compute_collective_tc",
    "xla_enable_async_all_gather")}

SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # parts of one cube
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
GIB = 2**30

# Peaks, bandwidths and shapes from cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x), of the larger slices the
# common ones. hbm_bytes is what libtpu calls "available HBM" when a program does not fit. ICI: the sheets' numbers
# (v5p: 1200 GB/s a chip over 6 links and both ways) less the tenth that no program gets. DCN: the sheets' rates per
# chip (v5e 25, v5p 50, v6e and tpu7x 100 Gbit/s) times 4; v4 is on no sheet and assumed to be as v5p.
GENERATIONS = {g.name: g for g in (
    Generation("v4", "TPU v4", PEAKS["TPU v4"], int(30.75 * GIB), 1200e9, 4.5e10, 25e9,
               (*SMALL, "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x12", "8x8x16", "8x16x16", "12x16x16"), 4,
               {},  # SPARSE_CORE is accepted and makes nothing asynchronous
               options={"chip_config_name": "megacore"}),  # one device a chip, as JAX has it on a real v4
    Generation("v5e", "TPU v5 lite", PEAKS["TPU v5 lite"], int(15.75 * GIB), 819e9, 4.5e10, 12.5e9,
               FLAT, 16, FUSED_STEPS),
    Generation("v5p", "TPU v5", PEAKS["TPU v5"], int(95.73 * GIB), 2765e9, 9e10, 25e9,
               (*SMALL, "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x8x12", "8x8x8", "8x8x12", "8x8x16", "8x16x16",
                "16x16x16", "16x16x24"), 4, SPARSE_CORE),
    Generation("v6e", "TPU v6 lite", PEAKS["TPU v6 lite"], int(31.24 * GIB), 1638e9, 9e10, 50e9,
               FLAT, 16, SPARSE_CORE),
    Generation("tpu7x", "TPU7x", PEAKS["TPU7x"], int(94.74 * GIB), 7380e9 / 2, 9e10, 50e9,
               (*SMALL, "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24", "16x24x24"),
               4, {},  # asynchronous by default
               devices_per_chip=2),
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

    Raises UserError for a slice that Google does not sell, naming the nearest ones, and if libtpu is not installed.
    """
    known = [f"{g.name}:{shape}" for g in GENERATIONS.values() for shape in g.shapes]
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*:[\dx]+)", name)
    prefix, one = match.groups() if match else (None, name)
    if one not in known:
        raise UserError(f"topology {name!r} does not exist: it takes a slice that can be booked, or several as in"
                        f" 2x{known[0]}; the nearest are {', '.join(nearest(one, known))}")
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


def compile_only(generation: Generation, name: str, shape: tuple[int, ...], slices: int) -> list[Any]:
    """Devices that programs can be compiled for and not run on."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"compiling for {name} needs the TPU compiler, which runs on any Linux machine:"
                        ' pip install "sslx[tpu]"')
    # Without these libtpu asks a metadata server for a TPU that is not there, and a second process aborts on a lock.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    wrap = (*generation.wrap(shape), False)[:3]  # libtpu wants three; without any it leaves the torus open
    options = dict(generation.options, wrap=wrap)
    if slices > 1:
        options["num_slices"] = slices
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


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
