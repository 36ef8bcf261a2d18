"""What is shared by all rows: shifts and scales of the last dimensions, whose gradients are sums over the others.

XLA's CPU backend sums columns an element at a time; as a product with ones the sum is several times faster. There
`plus`, `times` and `mean` state their gradients so; elsewhere they are what they say.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sslx import flops
from sslx.sharding import platform


def plus(x, b):
    """x [..., *C] + b [*C]."""
    return shifted(x, b) if platform() == "cpu" else x + b


def times(x, s):
    """x [..., *C] * s [*C]."""
    return stretched(x, s) if platform() == "cpu" else x * s


def mean(x):
    """The mean of x [..., C] over all but the last dimension, [C]."""
    return averaged(x) if platform() == "cpu" else x.mean(tuple(range(x.ndim - 1)))


def total(x, n: int, cut: P):
    """The sum of x over its first n dimensions, as a product with ones, float32; the result is sharded as `cut`."""
    ones = jnp.ones(x.shape[:n], x.dtype, out_sharding=placed(P(*spec_of(x)[:n])))
    dimensions = ((tuple(range(n)),) * 2, ((), ()))
    with flops.summing():
        return jax.lax.dot_general(ones, x, dimensions, precision="highest", preferred_element_type=jnp.float32,
                                   out_sharding=placed(cut))


def spec_of(x) -> P:
    return jax.typeof(x).sharding.spec


def placed(cut: P) -> P | None:
    """What `out_sharding` takes: none where there is no mesh."""
    return cut if jax.sharding.get_abstract_mesh().axis_names else None


@jax.custom_vjp
def shifted(x, b):
    return x + b


@jax.custom_vjp
def stretched(x, s):
    return x * s


@jax.custom_vjp
def averaged(x):
    return total(x, x.ndim - 1, P()) / math.prod(x.shape[:-1])


def shifted_backward(b, d):
    d = jax.lax.optimization_barrier(d)  # else it is computed once more for each of its uses, transposed
    return d, like(b, d)


def stretched_backward(kept, d):
    x, s = kept
    d = jax.lax.optimization_barrier(d)
    return d * s, like(s, d * x)


def averaged_backward(x, d):
    shared = (d / math.prod(x.shape[:-1])).astype(x.dtype)
    return (jnp.broadcast_to(shared, x.shape, out_sharding=placed(spec_of(x))),)


def like(b, d) -> jax.Array:
    """The gradient of b, of which d is each row's part."""
    return total(d, d.ndim - b.ndim, spec_of(b)).astype(b.dtype)


shifted.defvjp(lambda x, b: (x + b, b), shifted_backward)
stretched.defvjp(lambda x, s: (x * s, (x, s)), stretched_backward)
averaged.defvjp(lambda x: (averaged(x), x), averaged_backward)
