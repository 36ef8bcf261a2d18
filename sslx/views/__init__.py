"""Views: corruption on the device, inside the jitted step, as functions of a key and a batch.

All random numbers of a batch come from few large draws: with partitionable keys (JAX's default) a
number depends on its place in the global array alone, so views do not change with the mesh.

Several views of a batch lie side by side, row by row (`interleave`), so that all views of a row are where it is.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sslx.sharding import spec


def rows() -> jax.sharding.PartitionSpec | None:
    """The sharding of a batch's rows under the current mesh; None where there is no explicit mesh."""
    return spec("batch") if jax.sharding.get_abstract_mesh().are_all_axes_explicit else None


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Numbers in [0, 1), float32[shape], with the rows of the global batch first."""
    return jax.random.uniform(key, shape, out_sharding=rows())


def interleave(parts: Sequence[jax.Array]) -> jax.Array:
    """V arrays [B, ...] as one [B V, ...]: row b of part v is row b V + v."""
    x = jnp.stack(parts, 1)
    return x.reshape(-1, *x.shape[2:])


def separate(x: jax.Array, n: int) -> list[jax.Array]:
    """The n arrays [B, ...] of which `interleave` made x."""
    x = x.reshape(-1, n, *x.shape[1:])
    return [x[:, v] for v in range(n)]
