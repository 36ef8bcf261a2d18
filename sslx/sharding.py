"""The mesh, the rules from logical axes to mesh axes, and the few helpers that touch them.

Explicit sharding: every array's type carries its PartitionSpec, so a forgotten gather is a type
error and not a slow run. A weight is born sharded by its logical axes (`spec`); ZeRO-3 is the one
visible `gather` before its use, whose transpose reduce-scatters the gradient.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sslx.config import LARGEST_INT, Only, UserError
from sslx.topology import arrange

# Outermost first: what comes last talks most, and lies on neighbouring devices.
AXES = ("data", "fsdp", "expert", "context", "tensor")

Size = Annotated[int, Only(lambda n: n == -1 or 1 <= n <= LARGEST_INT,
                           "a positive number of devices, or -1 for the rest")]

# logical axis -> mesh axis. The first three shard activations, the others weights and what they make.
RULES: dict[str | None, Any] = {
    "batch": ("data", "fsdp", "expert"),
    "sequence": "context",              # time
    "residual": ("context", "tensor"),  # time of the residual stream, between the products of a block
    "embed": ("fsdp", "expert"),  # the side of a weight that faces the residual stream
    "heads": "tensor",
    "hidden": "tensor",   # of an MLP
    "vocab": "tensor",    # token ids, prototypes
    "experts": "expert",
    "expert_embed": "fsdp",  # the same side of an expert's weight
    None: None,
}


def make_mesh(*, data: Size = -1, fsdp: Size = 1, tensor: Size = 1, context: Size = 1, expert: Size = 1,
              devices: list | None = None) -> Mesh:
    """A mesh over all devices; one axis may be -1, "the rest".

    data:    replicas.
    fsdp:    replicas that share the weights (ZeRO-3).
    tensor:  heads, hidden units, vocabulary and prototypes of one replica; the residual stream is cut along time.
    context: time of one replica: long sequences.
    expert:  replicas that share the experts of a mixture.
    """
    devices = jax.devices() if devices is None else devices
    shape = dict(data=data, fsdp=fsdp, expert=expert, context=context, tensor=tensor)
    free = [a for a, n in shape.items() if n == -1]
    known = math.prod(n for n in shape.values() if n != -1)
    if len(free) > 1:
        raise UserError(f"mesh.{' and mesh.'.join(free)} are -1; only one axis can be the rest")
    if len(devices) % known or (not free and known != len(devices)):
        wanted = " x ".join(f"{a}={n}" for a, n in shape.items())
        raise UserError(f"mesh {wanted} does not fit {len(devices)} devices: the product must be {len(devices)}"
                        " (set one axis to -1 for the rest)")
    if free:
        shape[free[0]] = len(devices) // known
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    return Mesh(arrange(tuple(shape.values()), devices, slices), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def spec(*logical: str | None) -> P:
    """The PartitionSpec of an array whose dimensions have these logical axes."""
    return P(*(RULES[name] for name in logical))


def axis_size(logical: str) -> int:
    """Over how many devices of the current mesh a logical axis is spread."""
    mesh, axes = jax.sharding.get_abstract_mesh().shape, RULES[logical]
    return math.prod(mesh.get(axis, 1) for axis in axes_of(P(axes)))


def spec_of(x) -> P:
    """The PartitionSpec in the type of an array."""
    return jax.typeof(x).sharding.spec


def axes_of(cut: P) -> tuple[str, ...]:
    """The axes of the mesh that a PartitionSpec has."""
    return tuple(axis for part in cut if part is not None for axis in ((part,) if isinstance(part, str) else part))


def residual(T: int) -> P:
    """The PartitionSpec of a residual stream [B, T, D]: time over `tensor` as well, where it divides.

    Raises UserError if mesh.context does not divide T.
    """
    if T % axis_size("sequence"):
        raise UserError(f"mesh.context={axis_size('sequence')} does not divide a sequence of {T} tokens or patches;"
                        " choose a length that it divides, or mesh.context=1")
    return spec("batch", "sequence" if T % axis_size("residual") else "residual", None)


def whole(x_BTD: jax.Array) -> jax.Array:
    """Tokens with all of time on every device of a replica, for what picks among them."""
    return jax.sharding.reshard(x_BTD, spec("batch", None, None))


def platform() -> str:
    """What the devices of the current mesh are, which need not be here: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Rows over all data-parallel devices."""
    return NamedSharding(mesh, spec("batch"))


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def gather(weight: jax.Array) -> jax.Array:
    """A weight with its embed side whole, still sharded over `tensor`. The gradient is reduce-scattered."""
    cut = (RULES["embed"], RULES["expert_embed"])
    return jax.sharding.reshard(weight, P(*(None if axis in cut else axis for axis in spec_of(weight))))


def replicate(x: jax.Array) -> jax.Array:
    """An activation whole on every device, as in the all-pairs products of contrastive losses."""
    return jax.sharding.reshard(x, P())


def summed_over_devices(local: Callable, arrays: Sequence[jax.Array], cut: P, n: int) -> Any:
    """`local` of each device's part of arrays cut alike, summed over the devices that share the first n dimensions.

    What it makes is cut as the other dimensions are.
    """
    axes, summed = axes_of(cut), axes_of(P(*cut[:n]))
    if not axes:
        return local(*arrays)
    over = (lambda *parts: jax.lax.psum(local(*parts), summed)) if summed else local
    # Of these axes alone, since replicas of the work count once; JAX takes some of a mesh's axes under jit only.
    return jax.jit(jax.shard_map(over, in_specs=cut, out_specs=P(*cut[n:]), axis_names=set(axes),
                                 check_vma=False))(*arrays)
