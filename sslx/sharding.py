"""The mesh, the rules from logical axes to mesh axes, and the few helpers that touch them.

Explicit sharding: every array's type carries its PartitionSpec, so a forgotten gather is a type
error and not a slow run. A weight is born sharded by its logical axes (`spec`); ZeRO-3 is the one
visible `gather` before its use, whose transpose reduce-scatters the gradient.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sslx.config import UserError

AXES = ("data", "fsdp", "tensor")

# logical axis -> mesh axis. "batch" shards examples; the others shard weights and what they make.
RULES: dict[str | None, Any] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",      # the side of a weight that faces the residual stream
    "heads": "tensor",
    "hidden": "tensor",   # of an MLP
    "vocab": "tensor",    # token ids, prototypes
    None: None,
}


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """A mesh over all devices; one axis may be -1, "the rest"."""
    devices = jax.devices() if devices is None else devices
    shape = dict(data=data, fsdp=fsdp, tensor=tensor)
    free = [a for a, n in shape.items() if n == -1]
    known = math.prod(n for n in shape.values() if n != -1)
    for axis, n in shape.items():
        if n != -1 and n < 1:
            raise UserError(f"mesh.{axis} is {n}; it takes a positive number of devices, or -1 for the rest")
    if len(free) > 1:
        raise UserError(f"mesh.{' and mesh.'.join(free)} are -1; only one axis can be the rest")
    if len(devices) % known or (not free and known != len(devices)):
        wanted = " x ".join(f"{a}={n}" for a, n in shape.items())
        raise UserError(f"mesh {wanted} does not fit {len(devices)} devices: the product must be {len(devices)}"
                        " (set one axis to -1 for the rest)")
    if free:
        shape[free[0]] = len(devices) // known
    return Mesh(np.asarray(devices).reshape(tuple(shape.values())), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def spec(*logical: str | None) -> P:
    """The PartitionSpec of an array whose dimensions have these logical axes."""
    return P(*(RULES[name] for name in logical))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all data-parallel devices."""
    return NamedSharding(mesh, spec("batch"))


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def gather(weight: jax.Array) -> jax.Array:
    """A weight whole over `fsdp`, still sharded over `tensor`. The gradient is reduce-scattered."""
    axes = jax.typeof(weight).sharding.spec
    return jax.sharding.reshard(weight, P(*(None if axis == "fsdp" else axis for axis in axes)))


def replicate(x: jax.Array) -> jax.Array:
    """An activation whole on every device, as in the all-pairs products of contrastive losses."""
    return jax.sharding.reshard(x, P())
