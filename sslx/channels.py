"""What all rows share: scales and shifts of the last dimensions, whose gradients are sums over the others; moments.

XLA's CPU backend sums columns an element at a time. There a sum is a product of ones with rows that are wide, of so
many at a time that what is made to be summed stays in a cache; `plus`, `times`, `affine` and `moments` state their
gradients so. Elsewhere they are what they say.
"""

import math
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from sslx import flops
from sslx.sharding import platform, spec_of, summed_over_devices

WIDE = 512  # elements of what is summed as one row: narrow ones side by side
CACHED = 1 << 17  # bytes of an array that are summed at a time


def plus(x, b):
    """x [..., *C] + b [*C]."""
    return shifted(x, b) if platform() == "cpu" else x + b


def times(x, s):
    """x [..., *C] * s [*C]."""
    return stretched(x, s) if platform() == "cpu" else x * s


def affine(x, s, b):
    """x [..., *C] * s [*C] + b [*C]."""
    return stretched(x, s, b) if platform() == "cpu" else x * s + b


def moments(x):
    """Mean and variance of x [..., C], float32, over all but the last dimension, [C] each."""
    first, second = (powers(x) if platform() == "cpu" else
                     [y.sum(tuple(range(x.ndim - 1))) for y in (x, jnp.square(x))])
    n = math.prod(x.shape[:-1])
    # What is rounded may leave less than nothing of the difference, of numbers that hardly differ.
    return first / n, jnp.maximum(second / n - jnp.square(first / n), 0)


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`, or 1."""
    return next((k for k in range(min(n, most), 1, -1) if n % k == 0), 1)


def sums(terms: Sequence[Callable], arrays: Sequence[jax.Array], n: int) -> list[jax.Array]:
    """Of each term(*arrays), the arrays being alike, the sum over its first n dimensions, float32."""
    def local(*parts):
        N, shared = math.prod(parts[0].shape[:n]), parts[0].shape[n:]
        C = math.prod(shared)
        side_by_side = largest_divisor(N, WIDE // C)
        parts = [part.reshape(N // side_by_side, side_by_side * C) for part in parts]
        rows = len(parts[0])
        at_a_time = min(rows, max(CACHED // parts[0][0].nbytes, 1))

        def of(start, size: int):
            cuts = [jax.lax.dynamic_slice_in_dim(part, start, size) for part in parts]
            # Without the barrier terms are made inside the products, an element at a time.
            made = jax.lax.optimization_barrier([term(*cuts) for term in terms])
            return [jax.lax.dot(jnp.ones(size, y.dtype), y, precision="highest", preferred_element_type=jnp.float32)
                    for y in made]

        def add(i, totals):
            return jax.tree.map(operator.add, totals, of(i * at_a_time, at_a_time))

        whole, rest = divmod(rows, at_a_time)
        totals = of(rows - rest, rest) if rest else [jnp.zeros(parts[0].shape[1])] * len(terms)
        totals = jax.lax.fori_loop(0, whole, add, totals)
        return [total.reshape(side_by_side, *shared).sum(0) for total in totals]

    with flops.summing():
        return summed_over_devices(local, arrays, spec_of(arrays[0]), n)


@jax.custom_vjp
def shifted(x, b):
    return x + b


@jax.custom_vjp
def stretched(x, s, *b):
    """x * s, and if there is a b, plus that."""
    return sum(b, start=x * s)


@jax.custom_vjp
def powers(x):
    """The sums of x and of its square."""
    return sums([lambda x: x, jnp.square], [x], x.ndim - 1)


def shifted_backward(b, d):
    d = jax.lax.optimization_barrier(d)  # else it is computed once more for each of its uses
    return d, *like([b], [lambda d: d], d)


def stretched_backward(kept, d):
    x, s, *b = kept
    d = jax.lax.optimization_barrier(d)
    return d * s, *like([s, *b], [operator.mul, *[lambda d, x: d] * len(b)], d, x)


def powers_backward(x, d):
    return (d[0] + 2 * d[1] * x,)


def like(shared: Sequence[jax.Array], terms: Sequence[Callable], *arrays: jax.Array) -> list[jax.Array]:
    """The gradients of what rows share, of which the terms are each row's part."""
    found = [total.astype(y.dtype)
             for total, y in zip(sums(terms, arrays, arrays[0].ndim - shared[0].ndim), shared, strict=True)]
    return [total if spec_of(total) == spec_of(y) else jax.sharding.reshard(total, spec_of(y))
            for total, y in zip(found, shared, strict=True)]


shifted.defvjp(lambda x, b: (x + b, b), shifted_backward)
stretched.defvjp(lambda *kept: (stretched(*kept), kept), stretched_backward)
powers.defvjp(lambda x: (powers(x), x), powers_backward)
