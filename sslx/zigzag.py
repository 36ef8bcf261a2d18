"""Zigzag: the order of time in which the devices of `context` have equal shares of causal attention.

A query sees the keys before it, so of contiguous parts of time the last has nearly all the work. Cut into 2C pieces,
time lies on C devices in pairs: device c holds piece c and its mirror, 2C - 1 - c, as in Llama 3 (Grattafiori et al.
2024). A stack moves its tokens on entry and on exit; in between, what depends on the order of time asks here.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sslx.sharding import axis_size, spec_of


def pieces() -> list[int]:
    """The 2C pieces of time in the order in which the devices hold them."""
    C = axis_size("sequence")
    return [piece for c in range(C) for piece in (c, 2 * C - 1 - c)]


def times(T: int) -> np.ndarray:
    """The time of the token at each place, int32 [T]."""
    order = pieces()
    return np.arange(T, dtype=np.int32).reshape(len(order), -1)[order].ravel()


def arrange(x: jax.Array, axis: int = 1) -> jax.Array:
    """From the order of time to zigzag, for an array whose time is whole on every device."""
    return reorder(x, pieces(), axis)


def restore(x: jax.Array, axis: int = 1) -> jax.Array:
    """From zigzag to the order of time, for an array whose time is whole on every device."""
    return reorder(x, np.argsort(pieces()).tolist(), axis)


def reorder(x: jax.Array, order: list[int], axis: int) -> jax.Array:
    parts = jnp.split(x, len(order), axis)
    return jnp.concatenate([parts[i] for i in order], axis)


def tokens_per_device(x_BTD: jax.Array) -> int:
    return jax.typeof(x_BTD).sharding.shard_shape(x_BTD.shape)[1]


def helps(x_BTD: jax.Array) -> bool:
    """Whether time lies over `context`, and can be cut for zigzag."""
    return axis_size("sequence") > 1 and tokens_per_device(x_BTD) % 2 == 0


def scatter(x_BTD: jax.Array) -> jax.Array:
    """A residual stream from the order of time to zigzag; every token is sent once."""
    cut = spec_of(x_BTD)
    unit_at = times(2 * x_BTD.shape[1] // tokens_per_device(x_BTD))

    # In units of half of what a device has, device d holds 2d and 2d + 1 by time. By zigzag as well it holds an even
    # and an odd one, so that two permutations of the devices move them all.
    routes = [[(unit // 2, place // 2) for place, unit in enumerate(unit_at.tolist()) if unit % 2 == odd]
              for odd in (0, 1)]
    odd_comes_first = unit_at[::2] % 2 == 1

    def exchange(x):
        even, odd = (jax.lax.ppermute(half, cut[1], route)
                     for half, route in zip(jnp.split(x, 2, 1), routes, strict=True))
        turned = jnp.asarray(odd_comes_first)[jax.lax.axis_index(cut[1])]
        return jnp.concatenate([jnp.where(turned, odd, even), jnp.where(turned, even, odd)], 1)

    return jax.shard_map(exchange, in_specs=cut, out_specs=cut)(x_BTD)


def collect(x_BTD: jax.Array) -> jax.Array:
    """A residual stream from zigzag to the order of time: the inverse of a permutation is its transpose."""
    return jax.linear_transpose(scatter, x_BTD)(x_BTD)[0]
