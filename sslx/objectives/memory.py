"""A vector for each example of the data, the examples spread over the devices that share a batch.

B batch, N examples and what fills the last of equal parts, D features.
"""

import functools

import jax
import jax.numpy as jnp

from sslx.config import UserError
from sslx.sharding import RULES, axis_size, replicate, spec

PARTS = 1024  # so many equal parts, whatever the mesh, that a checkpoint moves to another


def spread(n_examples: int, *features: int):
    """Zeros [N, ...]. Raises UserError unless they divide over the devices of a batch."""
    n, devices = -(-n_examples // PARTS) * PARTS, axis_size("batch")
    if n % devices:
        raise UserError(f"a memory of {n_examples} examples, filled up to {n}, does not divide over the {devices}"
                        f" devices that share a batch (mesh.data x mesh.fsdp); choose a divisor of {PARTS}")
    return jnp.zeros((n, *features), out_sharding=spec("batch"))


def write(memory_ND, index_B, new_BD):
    """The memory with these vectors, without a gradient, at their examples; each device writes what is its own."""
    axes = RULES["batch"]

    @functools.partial(jax.shard_map, in_specs=(spec("batch"), spec(), spec()), out_specs=spec("batch"))
    def own(part_ND, index_B, new_BD):
        first = jax.lax.axis_index(axes) * len(part_ND)
        at_B = jnp.where((index_B >= first) & (index_B < first + len(part_ND)), index_B - first, len(part_ND))
        return part_ND.at[at_B].set(new_BD, mode="drop")

    return own(memory_ND, replicate(index_B), replicate(jax.lax.stop_gradient(new_BD)))


def lookup(memory_ND, index_B):
    """The vectors of some examples, [B, D], whole on every device."""
    return memory_ND.at[index_B].get(out_sharding=spec())
