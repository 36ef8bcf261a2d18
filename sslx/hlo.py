"""What a compiled program does: FLOPs, collectives and a modelled schedule, read from its scheduled HLO text.

`compiled.cost_analysis()` counts a loop's body once and knows no network. Here the program is walked in the order
the compiler scheduled it, through loops (times their trips), fusions, calls and conditionals (the longest branch).

The model of time: one device computes one thing after the other, each taking the longer of FLOPs at peak and HBM bytes
at full bandwidth. Beside it run queues, each one transfer after the other: the links of a slice (ICI, NVLink), one for
each dimension and direction of a torus, the network between slices (DCN, InfiniBand), and copies within a device. A
collective takes all links that it uses for all of its time. What starts a transfer goes on at once, what ends it waits.
Left out: latencies, element-wise work beyond its bytes, congestion by other groups, copies and computation slowing
each other.
"""

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from sslx.flops import taps
from sslx.topology import Generation


class Collective(NamedTuple):
    """Collectives of one kind over the same mesh axes, of one device in one step.

    group:         devices that take part together; on DCN slices.
    count:         executions.
    wire_bytes:    that a device sends, over all executions.
    largest_bytes: of one execution.
    network:       "ici" between the chips of a slice, "dcn" between slices.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    count: int  # type: ignore[assignment]  # hides tuple.count
    wire_bytes: int
    largest_bytes: int
    is_async: bool
    network: str


class Schedule(NamedTuple):
    """Seconds of the modelled step, which is compute_s + exposed_s.

    compute_s:     computing, and waiting for the device's own memory.
    ici_s, dcn_s:  links work, one collective after the other.
    exposed_s:     nothing is computed because of the links.
    async_share:   of the bytes on the wire, what moves beside computation if there is any to do.
    hidden_share:  of the time that some link is busy, what computation covers. Both are 1 without communication.
    """

    step_s: float
    compute_s: float
    ici_s: float
    dcn_s: float
    exposed_s: float
    async_share: float
    hidden_share: float


class Program(NamedTuple):
    """One step of one device.

    flops:           of matrix products and convolutions, and of kernels as given.
    unknown_trips:   loops whose trips could not be found; they are counted once.
    hbm_bytes:       read and written; what stays in on-chip memory is left out.
    unknown_kernels: kernels that may multiply matrices and whose FLOPs were not given; they are counted as none.
    """

    flops: int
    collectives: tuple[Collective, ...]
    unknown_trips: tuple[str, ...]
    schedule: Schedule
    hbm_bytes: int
    unknown_kernels: tuple[str, ...]


def analyze(text: str, mesh: Mesh, generation: Generation, kernels: Mapping[str, int] = {}) -> Program:
    """What `compiled.as_text()` does on a device of `mesh`; `kernels` are FLOPs of one call by kernel name."""
    module = parse(text)
    walk = Walk(module, Network(mesh, generation), generation, kernels)
    timeline = Timeline()
    walk.run(module.entry, timeline, 1, unknown)
    return walk.program(timeline)


# The text

class Shape(NamedTuple):
    """An array; `space` 0 is HBM, others are on the chip."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)  # pred has none and takes a byte, as the empty token takes nothing
        return math.prod(self.dims) * (int(bits.group()) if bits else 8 * (self.dtype == "pred")) // 8


class Op(NamedTuple):
    """`%name = shapes opcode(%operands), attributes`; `literal` is what stands in the brackets."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str

    def attribute(self, key: str) -> str | None:
        """The value of `key=value` up to the next comma outside braces; braces around it are taken off."""
        found = re.search(rf"(?<![\w]){key}=(?:\{{([^}}]*)\}}|([^,{{ ]+))", self.attributes)
        return (found.group(2) if found.group(1) is None else found.group(1)) if found else None

    def called(self, key: str) -> list[str]:
        """The names of the computations in an attribute."""
        return re.findall(r"%([\w.\-]+)", self.attribute(key) or "")


class Computation(NamedTuple):
    """Ops in their scheduled order, and who reads what."""

    name: str
    ops: dict[str, Op]
    root: Op
    users: dict[str, list[Op]]


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: Computation


ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{[^{}]*?(?:S\((\d+)\))?\})?")
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
LINE = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)$")
OPCODE = re.compile(r"(?<= )([a-z][\w\-]*)\(")


def parse(text: str) -> Module:
    """The computations of an HLO module. One ends where a line begins with `}` and is not kernel metadata's `}}`."""
    computations, entry = {}, ""
    name, root = "", ""
    ops: dict[str, Op] = {}
    for line in text.splitlines():
        if header := HEADER.match(line):
            name, ops, root = header.group(2), {}, ""
            entry = name if header.group(1) else entry
        elif found := LINE.match(line):
            op = parse_op(found.group(2), re.sub(r"/\*.*?\*/", "", found.group(3)))
            ops[op.name] = op
            root = op.name if found.group(1) else root
        elif name and (line == "}" or line.startswith("}, ")):
            users: dict[str, list[Op]] = {}
            for op in ops.values():
                for operand in op.operands:
                    users.setdefault(operand, []).append(op)
            computations[name] = Computation(name, ops, ops[root], users)
            name = ""
    return Module(computations, computations[entry])


def parse_op(name: str, text: str) -> Op:
    """`shapes opcode(operands), attributes`."""
    opcode = OPCODE.search(text)
    assert opcode, f"no opcode in {text[:200]}"
    depth = 1
    for bracket in re.compile(r"[()]").finditer(text, opcode.end()):
        depth += 1 if bracket.group() == "(" else -1
        if not depth:
            break
    literal = text[opcode.end():bracket.start()]
    shapes = tuple(Shape(dtype, tuple(int(n.strip("<=")) for n in dims.split(",") if n), int(space or 0))
                   for dtype, dims, space in ARRAY.findall(text[:opcode.start()]))
    return Op(name, opcode.group(1), shapes, tuple(re.findall(r"%([\w.\-]+)", literal)), literal, text[bracket.end():])


# Trips of loops

class Affine(NamedTuple):
    """A number in a loop: the loop's variable at `path` as the iteration began, plus `offset`; no path: a constant."""

    path: tuple[int, ...] | None
    offset: int


Argument = Callable[[int, tuple[int, ...]], Affine | None]  # (parameter, path in its tuple) -> number


def unknown(parameter: int, path: tuple[int, ...]) -> Affine | None:
    """The numbers that a program is called with."""
    return None


TRANSPARENT = ("copy", "bitcast", "convert", "reshape", "copy-done", "optimization-barrier")


def number(module: Module, inside: Computation, name: str, path: tuple[int, ...], argument: Argument) -> Affine | None:
    """The integer at `path` of what `name` computes, given those of the parameters; None if it is not known."""
    op = inside.ops[name]

    def operand(i: int, path: tuple[int, ...] = ()) -> Affine | None:
        return number(module, inside, op.operands[i], path, argument)

    if op.opcode == "constant":
        return Affine(None, int(op.literal)) if re.fullmatch(r"-?\d+", op.literal) else None
    if op.opcode == "parameter":
        return argument(int(op.literal), path)
    if op.opcode == "get-tuple-element":
        return operand(0, (int(op.attribute("index") or 0), *path))
    if op.opcode == "tuple" and path:
        return operand(path[0], path[1:])
    if op.opcode == "copy-start":  # (destination, source, semaphore)
        return operand(0, path[1:])
    if op.opcode in TRANSPARENT:
        return operand(0, (0, *path) if op.opcode == "copy-done" else path)
    if op.opcode in ("add", "subtract"):
        left, right = operand(0), operand(1)
        if left and right and right.path is None:
            return Affine(left.path, left.offset + (right.offset if op.opcode == "add" else -right.offset))
        return Affine(right.path, left.offset + right.offset) if left and right and op.opcode == "add" else None
    if op.opcode in ("fusion", "call"):
        inner = module.computations[(op.called("calls") or op.called("to_apply"))[0]]
        return number(module, inner, inner.root.name, path, operand)
    return None


def loop_argument(module: Module, outside: Computation, loop: Op, argument: Argument) -> Argument:
    """The numbers a loop's body starts from: what it hands on unchanged is what it was before the loop."""
    body = module.computations[loop.called("body")[0]]

    def inside(_: int, path: tuple[int, ...]) -> Affine | None:
        after = number(module, body, body.root.name, path, lambda _, p: Affine(p, 0))
        before = after == Affine(path, 0) and number(module, outside, loop.operands[0], path, argument)
        return before if before and before.path is None else Affine(path, 0)

    return inside


def trips(module: Module, outside: Computation, loop: Op, argument: Argument) -> int | None:
    """How often a while loop's body runs, from its start, step and bound; None if they are not constant."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known.group(1))
    body, condition = (module.computations[loop.called(key)[0]] for key in ("body", "condition"))
    inside = loop_argument(module, outside, loop, argument)
    sides = compared(module, condition, condition.root, inside)
    if not sides:
        return None
    left, right, direction = sides
    if left.path is None:
        left, right, direction = right, left, {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    if left.path is None or right.path is not None:
        return None
    start = number(module, outside, loop.operands[0], left.path, argument)
    after = number(module, body, body.root.name, left.path, inside)
    if not start or start.path is not None or not after or after.path != left.path or not after.offset:
        return None
    way, step = right.offset - (start.offset + left.offset), after.offset
    way += {"LE": 1, "GE": -1}.get(direction, 0)
    ends = {"L": step > 0, "G": step < 0, "N": way % step == 0 and way * step >= 0, "E": False}[direction[0]]
    return max(0, -(-way // step)) if ends else None


def compared(module: Module, inside: Computation, op: Op, argument: Argument) -> tuple[Affine, Affine, str] | None:
    """Both sides and the direction of the comparison that a loop's condition is."""
    if op.opcode in ("fusion", "call"):
        inner = module.computations[(op.called("calls") or op.called("to_apply"))[0]]
        return compared(module, inner, inner.root,
                        lambda n, path: number(module, inside, op.operands[n], path, argument))
    if op.opcode != "compare":
        return None
    left, right = (number(module, inside, name, (), argument) for name in op.operands)
    return (left, right, op.attribute("direction") or "") if left and right else None


# FLOPs and memory of an op

# Products that XLA leaves to NVIDIA's libraries.
LIBRARY = re.compile(r'custom_call_target="(__cublas\$(?:gemm|lt\$matmul)|__cudnn\$conv)')


def is_product(op: Op) -> bool:
    return op.opcode in ("dot", "convolution") or op.opcode == "custom-call" and bool(LIBRARY.search(op.attributes))


def product_flops(inside: Computation, op: Op) -> int:
    """2 FLOPs per multiply-add of a dot or convolution; zeros that padding and dilation insert are no work."""
    lhs, rhs = (inside.ops[name].shapes[0].dims for name in op.operands[:2])
    out = op.shapes[0].dims
    if contracting := re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', op.attributes):  # dot, cuBLAS
        return 2 * math.prod(out) * math.prod(lhs[int(d)] for d in re.findall(r"\d+", contracting.group(1)))
    if op.opcode == "dot":
        return 2 * math.prod(out)
    # cuDNN's gradients have the window of the forward pass.
    if "$convBackwardInput" in op.attributes:
        lhs, out = out, lhs
    if "$convBackwardFilter" in op.attributes:
        rhs, out = out, rhs
    of_lhs, of_rhs, of_out = re.split("_|->", op.attribute("dim_labels") or "")
    window = dict(part.split("=") for part in (op.attribute("window") or "").split())
    flops = 2 * out[of_out.index("b")] * out[of_out.index("f")] * rhs[of_rhs.index("i")]
    for i in range(len(of_lhs) - 2):
        def of(key: str, default: str, i: int = i) -> list[int]:
            return [int(n) for n in (window[key].split("x")[i] if key in window else default).split("_")]

        flops *= taps(lhs[of_lhs.index(str(i))], rhs[of_rhs.index(str(i))], out[of_out.index(str(i))],
                      of("stride", "1")[0], of("pad", "0_0")[0], of("lhs_dilate", "1")[0], of("rhs_dilate", "1")[0])
    return flops


COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")

# These move no data, or what they call is walked by itself.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
        "while", "call", "conditional", "optimization-barrier", "add-dependency", "custom-call-start", "recv", "domain")


FUSIONS = ("fusion", "fusion-start")  # GPU: the latter run beside what follows, up to their fusion-done


def hbm(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.bytes for shape in shapes if shape.space == 0)


def traffic(module: Module, inside: Computation, op: Op) -> int:
    """Bytes that an op reads from HBM and writes to it. Of what it slices or updates in place, only that part."""
    if op.opcode in FREE:
        return 0
    read = [inside.ops[name].shapes for name in op.operands]
    if op.opcode in FUSIONS:
        inner = module.computations[op.called("calls")[0]]
        return sum(fusion_reads(module, inner, i) for i in range(len(read))) + fusion_writes(inner, inner.root)
    if op.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * hbm(op.shapes)
    if op.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * hbm(read[-1] if op.opcode == "scatter" else read[1])
    if op.opcode.endswith("-start"):  # (destination, source, semaphores)
        return hbm(op.shapes)
    if is_product(op):  # and the library's work space
        return sum(map(hbm, read)) + hbm(op.shapes[:1])
    return sum(map(hbm, read)) + hbm(op.shapes)


def fusion_reads(module: Module, inner: Computation, i: int) -> int:
    """Bytes that a fusion reads of its operand i."""
    parameter = next(op for op in inner.ops.values() if op.opcode == "parameter" and op.literal == str(i))
    whole = hbm(parameter.shapes)

    def reads(name: str) -> int:
        return sum(use(user, name) for user in inner.users.get(name, []))

    def use(user: Op, name: str) -> int:
        if user.opcode == "bitcast":
            return reads(user.name)
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            return sum(shape.bytes for shape in user.shapes)
        if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            return 0
        if user.opcode in (*COLLECTIVES, "tuple"):  # the link's work, or handed on
            return 0
        if user.opcode == "fusion":
            called = module.computations[user.called("calls")[0]]
            return sum(fusion_reads(module, called, j) for j, operand in enumerate(user.operands) if operand == name)
        return whole

    return min(whole, reads(parameter.name)) if whole else 0


def fusion_writes(inner: Computation, op: Op) -> int:
    """Bytes that a fusion writes, whose root (or a part of it) is `op`."""
    if op.opcode == "tuple":
        return sum(fusion_writes(inner, inner.ops[name]) for name in op.operands)
    if op.opcode == "bitcast" and hbm(op.shapes):
        return fusion_writes(inner, inner.ops[op.operands[0]])
    if op.opcode == "dynamic-update-slice" and hbm(op.shapes):
        return sum(shape.bytes for shape in inner.ops[op.operands[1]].shapes)
    return 0 if op.opcode in (*COLLECTIVES, "parameter") else hbm(op.shapes)


# Collectives

def groups(op: Op, n: int) -> np.ndarray:
    """Devices that take part together, one row a group, by their position in the flattened mesh of n devices."""
    text = op.attributes
    if pairs := re.search(r"source_target_pairs=\{\{(.*?)\}\}", text):
        return np.array([[int(i) for i in pair.split(",")] for pair in pairs.group(1).split("},{")])
    if explicit := re.search(r"replica_groups=\{\{(.*?)\}\}", text):
        return np.array([[int(i) for i in group.split(",")] for group in explicit.group(1).split("},{")])
    if tiled := re.search(r"replica_groups=(\[\S+?)(?:, |$)", text):
        return tiles(tiled.group(1))
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", text):
        return mesh_groups(*named.groups())
    return np.arange(n)[None]  # none named: all


def tiles(text: str) -> np.ndarray:
    """`[2,4]<=[4,2]T(1,0)`: count up in the shape on the right, transpose, reshape to that on the left."""
    left, right = text.split("<=")
    dims = [int(d) for d in re.findall(r"\d+", right.split("T")[0])]
    order = [int(d) for d in re.findall(r"\d+", right.split("T")[1])] if "T" in right else range(len(dims))
    counted = np.arange(math.prod(dims)).reshape(dims).transpose(order)
    return counted.reshape([int(d) for d in re.findall(r"\d+", left)]) if left else counted.ravel()


def mesh_groups(axes: str, device_ids: str | None, along: str) -> np.ndarray:
    """`mesh['a'=2,'b'=4] {'b'}`: the devices along b. `'b':(2)2` is the part of b of size 2 that 2 come before."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", axes)}
    wanted = {name: (int(before), int(size)) if before else (1, sizes[name])
              for name, before, size in re.findall(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?(?:,|$)", along)}
    dims, inner = [], []
    for name, size in sizes.items():
        before, part = wanted.get(name, (1, 1))
        dims += [before, part, size // before // part]
        inner.append(len(dims) - 2)
    if device_ids and device_ids[0] == "[":
        ids = tiles("<=" + device_ids)
    else:
        ids = np.array(device_ids.split(","), int) if device_ids else np.arange(math.prod(dims))
    outer = [d for d in range(len(dims)) if d not in inner]
    return ids.reshape(dims).transpose(outer + inner).reshape(-1, math.prod(dims[d] for d in inner))


def wire_bytes(kind: str, sent: int, n: int) -> int:
    """Bytes that each of n devices puts on the wire for operands of `sent` bytes, in rings: no algorithm needs less."""
    if kind == "all-gather":
        return sent * (n - 1)
    if kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
        return sent * (n - 1) // n
    return 2 * sent * (n - 1) // n if kind == "all-reduce" else sent


class Route(NamedTuple):
    """What a collective crosses: links, and their seconds per byte that a device puts on the wire."""

    axes: tuple[str, ...]
    group: int
    network: str
    seconds: float
    links: tuple[str, ...]


class Network:
    """Where the devices of a mesh are, and what lies between them."""

    def __init__(self, mesh: Mesh, generation: Generation):
        devices = list(mesh.devices.flat)
        self.mesh, self.generation, self.n = mesh, generation, len(devices)
        # Devices without coordinates (CPUs) stand in a row.
        self.chips = np.array([(getattr(d, "coords", None) or (i, 0, 0)) for i, d in enumerate(devices)])
        self.slices = np.array([generation.links.slice_of(d) for d in devices])
        self.shape = np.ptp(self.chips, axis=0) + 1

    def axes(self, ids: np.ndarray) -> tuple[str, ...]:
        """The mesh axes along which these devices differ."""
        places = np.unravel_index(ids, self.mesh.devices.shape)
        return tuple(a for a, place in zip(self.mesh.axis_names, places, strict=True) if np.ptp(place))

    def route(self, kind: str, op: Op) -> Route:
        """The way of a collective, by its first group: the others are like it.

        All devices of a chip share its links, and all of a slice what leaves it. Those in one group share the data too,
        but for an all-to-all, where each sends its own. DCN is slower than the links that lead to it.
        """
        found = groups(op, self.n)
        if kind == "collective-permute":
            return self.permute_route(found)
        g, axes, group, n = self.generation, self.axes(found[0]), found[0], found.shape[1]
        exchanged, chips = kind.endswith("all-to-all"), self.chips[group]
        if np.ptp(self.slices[group]):
            in_slice = n // len(np.unique(self.slices[group]))
            leaving = (n - in_slice) / (n - 1) if exchanged else 1 / in_slice
            return Route(axes, n, "dcn", self.dcn_seconds() * leaving, ("dcn",))
        on_chip = n // len(np.unique(chips, axis=0))
        if on_chip == n:
            return Route(axes, n, "ici", 1 / g.hbm_bytes_s, ("memory",))
        load, links = (g.links.exchange if exchanged else g.links.gather)(chips, self.shape)
        return Route(axes, n, "ici", g.devices_per_chip * load / (1 if exchanged else on_chip) / g.ici_bytes_s, links)

    def permute_route(self, pairs: np.ndarray) -> Route:
        """The way of a shift from device to device."""
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        axes = tuple(a for a in self.mesh.axis_names if any(a in self.axes(pair) for pair in pairs))
        n = cycle_length(pairs)
        if (self.slices[pairs[:, 0]] != self.slices[pairs[:, 1]]).any():
            return Route(axes, n, "dcn", self.dcn_seconds(), ("dcn",))
        g, sources, targets = self.generation, self.chips[pairs[:, 0]], self.chips[pairs[:, 1]]
        if (sources == targets).all():
            return Route(axes, n, "ici", 1 / g.hbm_bytes_s, ("memory",))
        load, links = g.links.shift(sources, targets, self.shape)
        return Route(axes, n, "ici", g.devices_per_chip * load / g.ici_bytes_s, links)

    def across_slices(self) -> Route:
        """The way of a transfer between corresponding devices of all slices."""
        places = np.array(np.unravel_index(np.arange(self.n), self.mesh.devices.shape))
        first = {int(s): places[:, self.slices == s].min(axis=1) for s in np.unique(self.slices)}
        moves = np.ptp(np.stack(list(first.values())), axis=0) > 0
        axes = tuple(a for a, moved in zip(self.mesh.axis_names, moves, strict=True) if moved)
        return Route(axes, len(first), "dcn", self.dcn_seconds(), ("dcn",))

    def dcn_seconds(self) -> float:
        """Per byte of a device: those of a host share its network cards and all send at once."""
        return self.generation.devices_per_host / self.generation.dcn_bytes_s


def cycle_length(pairs: np.ndarray) -> int:
    """Devices that the first pair's chain of source and target goes through."""
    target: dict[int, int] = dict(pairs.tolist())
    seen = [int(pairs[0, 0])]
    while (at := target.get(seen[-1], seen[0])) not in seen:
        seen.append(at)
    return len(seen)


# The schedule

class Transfer(NamedTuple):
    """What an op has to do with links and copies. phase: "start" and "done" of the same key, or "both" in one op."""

    phase: str
    key: str
    collectives: tuple[tuple[str, int, Route], ...] = ()  # (kind, bytes on the wire, way)


TICK = 1e-12  # seconds. Times are whole picoseconds, so that what is all exposed is hidden to 0 and not to 1e-16.


@dataclass
class Timeline:
    """The clock of the computing device, when each queue is free again, when transfers end, and sums.

    ends:    of transfers that are under way, and whether they are copies.
    serial:  what links work by network, one after the other.
    covered: until when some link is at work; `busy` is how long there was one.
    """

    now: int = 0
    free: dict[str, int] = field(default_factory=dict)
    ends: dict[str, tuple[bool, int]] = field(default_factory=dict)
    covered: int = 0
    busy: int = 0
    flops: int = 0
    hbm_bytes: int = 0
    serial: dict[str, int] = field(default_factory=lambda: {"ici": 0, "dcn": 0})
    exposed: int = 0
    collectives: dict[tuple, tuple[int, int, int]] = field(default_factory=dict)

    def enqueue(self, queues: tuple[str, ...], ticks: int) -> tuple[int, int]:
        """When a transfer that is ready now begins, and when it has ended."""
        begins = max(self.now, *(self.free.get(queue, 0) for queue in queues))
        self.free |= dict.fromkeys(queues, begins + ticks)
        return begins, begins + ticks

    def communicate(self, route: Route, ticks: int, times: int) -> int:
        """When a transfer over links has ended."""
        begins, end = self.enqueue(route.links, ticks)
        self.serial[route.network] += times * ticks
        self.busy += times * max(0, end - max(begins, self.covered))
        self.covered = max(self.covered, end)
        return end

    def wait(self, copies: bool, end: int, times: int) -> None:
        """Until a transfer's end. Waiting for links is exposed communication, for copies it is the device's own."""
        if end > self.now:
            self.exposed += times * (end - self.now) * (not copies)
            self.now = end


class Walk:
    """Runs a program on a timeline, and adds up what it does."""

    def __init__(self, module: Module, network: Network, generation: Generation, kernels: Mapping[str, int]):
        self.module, self.network, self.generation, self.kernels = module, network, generation, kernels
        self.unknown_trips: dict[str, None] = {}
        self.unknown_kernels: dict[str, None] = {}
        self.transfers: dict[str, Transfer | None] = {}

    def run(self, computation: Computation, timeline: Timeline, times: int, argument: Argument) -> None:
        """One execution on the clock, which stands for `times` in the sums."""
        for op in computation.ops.values():
            if op.opcode == "while":
                self.loop(computation, op, timeline, times, argument)
            elif op.opcode == "conditional":
                self.branch(op, timeline, times)
            elif op.opcode == "call":
                self.run(self.module.computations[op.called("to_apply")[0]], timeline, times,
                         self.call_argument(computation, op, argument))
            else:
                self.execute(computation, op, timeline, times)

    def call_argument(self, outside: Computation, op: Op, argument: Argument) -> Argument:
        """The numbers that a call hands over."""
        return lambda n, path: number(self.module, outside, op.operands[n], path, argument)

    def loop(self, outside: Computation, op: Op, timeline: Timeline, times: int, argument: Argument) -> None:
        """The first trip meets what is still on the links, the others are all as the second.

        That is exact where every transfer that a body starts ends in it. Where one from before the loop is still under
        way in the third trip, the others wait for it as the second did: too long, never too short.
        """
        n = trips(self.module, outside, op, argument)
        if n is None:
            self.unknown_trips[op.name] = None
            n = 1
        body = self.module.computations[op.called("body")[0]]
        inside = loop_argument(self.module, outside, op, argument)
        if n:
            self.run(body, timeline, times, inside)
        if n > 1:
            before = timeline.now
            self.run(body, timeline, times * (n - 1), inside)
            timeline.now += (n - 2) * (timeline.now - before)

    def branch(self, op: Op, timeline: Timeline, times: int) -> None:
        """The branch that takes longest."""
        names = [name for key in ("branch_computations", "true_computation", "false_computation")
                 for name in op.called(key)]
        ends = []
        for name in names:
            ends.append(copy.deepcopy(timeline))
            self.run(self.module.computations[name], ends[-1], times, unknown)
        vars(timeline).update(vars(max(ends, key=lambda end: end.now)))

    def execute(self, inside: Computation, op: Op, timeline: Timeline, times: int) -> None:
        """An op that calls nothing that is scheduled by itself."""
        transfer, flops = self.transfer(inside, op), self.flops(inside, op)
        # A later step of a transfer that is under way, fused with products.
        later_step = transfer and transfer.phase == "both" and transfer.key in timeline.ends
        if transfer and transfer.phase == "done":
            timeline.wait(*timeline.ends.pop(transfer.key, (True, 0)), times)
            return
        moves_itself = transfer is None or later_step or not transfer.collectives
        moved = traffic(self.module, inside, op) if moves_itself else 0
        computing, moving = ticks(flops / self.generation.peak_flops), ticks(moved / self.generation.hbm_bytes_s)
        timeline.flops += times * flops
        timeline.hbm_bytes += times * moved
        if transfer is None or later_step:
            timeline.now += max(computing, moving)
            return
        self.launch(transfer, moving, timeline, times)
        timeline.now += computing
        if transfer.phase == "both":
            timeline.wait(*timeline.ends.pop(transfer.key), times)

    def launch(self, transfer: Transfer, copying: int, timeline: Timeline, times: int) -> None:
        """Puts a transfer into its queue: its collectives, or without any a copy that takes so long."""
        for kind, wire, route in transfer.collectives:
            at = (kind, route.axes, route.group, transfer.phase == "start", route.network)
            count, total, largest = timeline.collectives.get(at, (0, 0, 0))
            timeline.collectives[at] = (count + times, total + times * wire, max(largest, wire))
            end = timeline.communicate(route, ticks(wire * route.seconds), times)
            timeline.ends[transfer.key] = (False, max(end, timeline.ends.get(transfer.key, (False, 0))[1]))
        if not transfer.collectives:
            timeline.ends[transfer.key] = (True, timeline.enqueue(("copies",), copying)[1])

    def flops(self, inside: Computation, op: Op) -> int:
        """FLOPs of one execution, with what is fused into it."""
        if is_product(op):
            return product_flops(inside, op)
        if op.opcode == "custom-call":
            name, target = op.name.split(".")[0], op.attribute("custom_call_target") or ""
            if name not in self.kernels and re.search("tpu_custom_call|matmul|gemm|conv|cudnn", target):
                self.unknown_kernels[name] = None
            return self.kernels.get(name, 0)
        if op.opcode in FUSIONS:
            inner = self.module.computations[op.called("calls")[0]]
            return sum(self.flops(inner, fused) for fused in inner.ops.values())
        return 0

    # What moves

    def transfer(self, inside: Computation, op: Op) -> Transfer | None:
        """What an op has to do with links and copies; None if it only computes."""
        if op.name not in self.transfers:
            self.transfers[op.name] = self.find_transfer(inside, op)
        return self.transfers[op.name]

    def find_transfer(self, inside: Computation, op: Op) -> Transfer | None:
        """Every spelling of a collective that the compilers use.

        - `all-gather` and its like wait for themselves; `all-gather-start` and `-done` do not (GPU: unless `is_sync`).
        - v5e: fusions that hold the collective and `AsyncCollectiveStart`, then fusions of products with steps of it,
          then `AsyncCollectiveDone`, all of one channel.
        - SparseCores: `custom-call-start()` only prepares, `custom-call-update` launches, `custom-call-done` waits;
          the collective is in what the first calls.
        - Across slices: `send` and `recv` through the host, joined by a rendezvous.
        """
        base, _, phase = op.opcode.rpartition("-")
        if op.opcode in COLLECTIVES:
            return Transfer("both", op.name, (self.collective(inside, op, op.opcode),))
        if base in COLLECTIVES and phase == "start":
            is_sync = '"is_sync":true' in op.attributes
            return Transfer("both" if is_sync else "start", op.name, (self.collective(inside, op, base),))
        if op.opcode == "send":
            return Transfer("start", rendezvous(op), (self.sent(op),))
        if op.opcode in ("send-done", "recv-done"):
            return Transfer("done", rendezvous(inside.ops[op.operands[0]]))
        if op.opcode == "custom-call-update":
            start = inside.ops[op.operands[0]]
            return Transfer("start", op.name, tuple(self.held(start.called("called_computations"))))
        if op.opcode == "fusion":
            called = op.called("calls")
            held = tuple(self.held(called))
            if not held:
                return None
            key, ops = self.channel(called), self.module.computations[called[0]].ops.values()
            text = " ".join(op.attribute("custom_call_target") or "" for op in ops)
            if "AsyncCollectiveDone" in text:
                return Transfer("done", key)
            return Transfer("start" if "AsyncCollectiveStart" in text else "both", key, held)
        if phase == "start" and op.operands:  # copies, slices, whatever else runs beside, with or without collectives
            inner = op.called("calls") + op.called("to_apply") + op.called("called_computations")
            return Transfer("start", op.name, tuple(self.held(inner)))
        if phase == "done":
            return Transfer("done", op.operands[0])
        return None

    def held(self, names: list[str]) -> Iterator[tuple[str, int, Route]]:
        """The collectives in computations that an op calls."""
        for computation in map(self.module.computations.__getitem__, names):
            for op in computation.ops.values():
                if op.opcode in COLLECTIVES:
                    scatter = op.opcode == "all-reduce" and computation.name.startswith("all-reduce-scatter")
                    yield self.collective(computation, op, "reduce-scatter" if scatter else op.opcode)
                yield from self.held(op.called("calls"))

    def channel(self, names: list[str]) -> str:
        """The channel of the collectives in computations: the same in all steps of one."""
        for computation in map(self.module.computations.__getitem__, names):
            for op in computation.ops.values():
                inner = op.attribute("channel_id") if op.opcode in COLLECTIVES else self.channel(op.called("calls"))
                if inner:
                    return inner
        return ""

    def collective(self, inside: Computation, op: Op, kind: str) -> tuple[str, int, Route]:
        route = self.network.route(op.opcode.removesuffix("-start"), op)
        sent = sum(shape.bytes for name in op.operands for shape in inside.ops[name].shapes)
        return kind, wire_bytes(kind, sent, route.group), route

    def sent(self, op: Op) -> tuple[str, int, Route]:
        """A transfer to the other slices; the first of its shapes is the data."""
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.attributes)
        name = kind.group(1).lower().replace("_", "-") if kind else "send"
        route = self.network.across_slices()
        return name, wire_bytes(name, op.shapes[0].bytes, route.group), route

    def program(self, timeline: Timeline) -> Program:
        """The sums. No schedule reads and writes faster than the memory."""
        exposed, ici, dcn = (TICK * n for n in (timeline.exposed, *timeline.serial.values()))
        compute = max(TICK * (timeline.now - timeline.exposed), timeline.hbm_bytes / self.generation.hbm_bytes_s)
        collectives = [Collective(kind, axes, group, count, total, largest, is_async, network)
                       for (kind, axes, group, is_async, network), (count, total, largest)
                       in timeline.collectives.items() if total]
        wire, busy = sum(c.wire_bytes for c in collectives), timeline.busy
        schedule = Schedule(compute + exposed, compute, ici, dcn, exposed,
                            sum(c.wire_bytes for c in collectives if c.is_async) / wire if wire else 1.0,
                            (busy - timeline.exposed) / busy if busy else 1.0)
        return Program(timeline.flops, tuple(sorted(collectives, key=lambda c: -c.wire_bytes)),
                       tuple(self.unknown_trips), schedule, timeline.hbm_bytes, tuple(self.unknown_kernels))


def ticks(seconds: float) -> int:
    return round(seconds / TICK)


def rendezvous(op: Op) -> str:
    """What a send and the recv of its answer have in common."""
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', op.attributes)
    return found.group(1) if found else op.name
