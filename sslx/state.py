"""TrainState: everything a resume needs, and nothing else. Keys are folded from the step, so none are stored."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sslx import guards
from sslx.objectives import Objective
from sslx.optim import Optimizer


class TrainState(NamedTuple):
    """step: int32, steps done. tokens: uint32[2] (high, low), corpus units seen, exact beyond float32 and int32.

    recent: losses and gradients of the newest sound steps (sslx/guards.py).
    """

    step: jax.Array
    tokens: jax.Array
    params: Any
    aux: Any
    opt_state: Any
    recent: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def create(objective: Objective, optimizer: Optimizer, seed: int, batch) -> TrainState:
    """The state at step 0; traced under the mesh, every weight is born sharded."""
    params, aux = objective.init(jax.random.key(seed), batch)
    params, opt_state = optimizer.init(params)
    return TrainState(jnp.int32(0), jnp.zeros(2, jnp.uint32), params, aux, opt_state, guards.no_history())


def abstract(objective: Objective, optimizer: Optimizer, seed: int, batch) -> TrainState:
    """Shapes, dtypes and shardings of what `create` returns, without computing it; the mesh must be set."""
    mesh = jax.sharding.get_mesh()

    def concrete(x):
        spec = x.sharding.spec if x.sharding else jax.sharding.PartitionSpec()  # a constant has none
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(concrete, jax.eval_shape(functools.partial(create, objective, optimizer, seed), batch))


def add_exactly(counter: jax.Array, n: jax.Array) -> jax.Array:
    """(high, low) + n with carry, for 0 <= n < 2^31."""
    high, low = counter
    new = low + n.astype(jnp.uint32)
    return jnp.stack([high + (new < low), new])


def exact(counter: np.ndarray) -> int:
    """The integer that (high, low) stands for."""
    return (int(counter[0]) << 32) + int(counter[1])
