"""Convolutions as each platform does them well.

XLA's CPU backend is slow where the output is smaller than the kernel, and at the gradient of a kernel. There they are
products with image patches, or with whole images where each output sees all of the input; the gradient of so few images
at a time that what it multiplies stays in a cache.

B batch, H W positions, C channels, P = k k C elements of a patch, R = k C of its row, O output channels.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sslx import flops
from sslx.channels import largest_divisor
from sslx.sharding import platform, spec_of, summed_over_devices

CACHED = 1 << 19  # bytes that the products of a kernel's gradient read of images at a time


def convolve(x_BHWC, w_KKCO, stride: int):
    """A convolution [B, H', W', O] with a square kernel, of images padded by half of it."""
    if platform() != "cpu":
        return direct(x_BHWC, w_KKCO, stride)
    seen = len(w_KKCO) // 2 + 1  # inputs along a side that all its outputs see
    return (whole if stride == 1 and max(x_BHWC.shape[1:3]) <= seen else on_cpu)(x_BHWC, w_KKCO, stride)


def direct(x_BHWC, w_KKCO, stride: int):
    """The convolution as XLA's own operation."""
    pad = len(w_KKCO) // 2
    return jax.lax.conv_general_dilated(x_BHWC, w_KKCO, (stride, stride), [(pad, pad)] * 2,
                                        dimension_numbers=("NHWC", "HWIO", "NHWC"))


def whole(x_BHWC, w_KKCO, stride: int):
    """The convolution of images no larger than what each output sees, as a product with whole images."""
    B, H, W, C = x_BHWC.shape
    k, *_, features = w_KKCO.shape
    tap_HH, tap_WW = (k // 2 + np.subtract.outer(range(n), range(n)) for n in (H, W))  # from an input to an output
    w_HWHWCO = w_KKCO[tap_HH[:, None, :, None], tap_WW[None, :, None, :]]
    matrix = w_HWHWCO.transpose(0, 1, 4, 2, 3, 5).reshape(H * W * C, H * W * features)
    return (x_BHWC.reshape(B, -1) @ matrix).reshape(B, H, W, features)


def of_patches(x_BHWC, w_KKCO, stride: int):
    """The convolution as a product with patches."""
    k, *_, features = w_KKCO.shape
    with needed(x_BHWC.shape[1:3], k, stride):
        return jnp.einsum("bhwp,po->bhwo", patches(x_BHWC, k, stride), w_KKCO.reshape(-1, features))


def forward(x_BHWC, w_KKCO, stride: int):
    """The faster of both on CPU."""
    k = len(w_KKCO)
    small = min(extent(n, k, stride) for n in x_BHWC.shape[1:3]) < k
    return (of_patches if small else direct)(x_BHWC, w_KKCO, stride)


def backward(stride: int, kept, d_BHWO):
    x_BHWC, w_KKCO = kept
    transposed = jax.linear_transpose(lambda x: forward(x, w_KKCO, stride), x_BHWC)
    return *transposed(d_BHWO), kernel_gradient(x_BHWC, d_BHWO, w_KKCO.shape, stride).astype(w_KKCO.dtype)


on_cpu = jax.custom_vjp(forward, nondiff_argnums=(2,))
on_cpu.defvjp(lambda x, w, stride: (forward(x, w, stride), (x, w)), backward)


def kernel_gradient(x_BHWC, d_BHWO, shape: tuple[int, ...], stride: int):
    """float32, of a kernel of this shape whose convolution has the gradient d; each device sums over its images.

    Channels lead, because XLA multiplies [R, B H' W'] by [B H' W', O] at twice the speed of their transposes.
    """
    k, _, C, _ = shape

    def local(x, d):
        _, rows, cols, features = d.shape
        n = largest_divisor(len(x), CACHED // (rows * cols * k * k * C * x.dtype.itemsize))

        def add(total_KKCO, part):
            x, d = part
            # Without the barriers what is multiplied is made inside the products, an element at a time.
            x_CBHW = jax.lax.optimization_barrier(x.transpose(3, 0, 1, 2))
            across_KCBHW = jax.lax.optimization_barrier(jnp.stack(shifted(x_CBHW, 3, cols, k, stride)))
            with needed(x.shape[2:3], k, stride):
                made = [of_row(across_KCBHW, d, i, stride) for i in range(k)]
            return total_KKCO + jnp.stack(made), None

        parts = tuple(y.reshape(-1, n, *y.shape[1:]) for y in (x, d))
        return jax.lax.scan(add, jnp.zeros((k, k, C, features)), parts)[0]

    return summed_over_devices(local, (x_BHWC, d_BHWO), P(*spec_of(x_BHWC)[:1]), 1)


def of_row(across_KCBHW, d_BHWO, i: int, stride: int):
    """[K, C, O], the gradient of the kernel's i-th row: of the outputs whose i-th row is no padding."""
    k, C, _, n, _ = across_KCBHW.shape
    above, (_, rows, _, features) = k // 2 - i, d_BHWO.shape
    first, last = max(0, -(-above // stride)), min(rows - 1, (n - 1 + above) // stride)
    if first > last:
        return jnp.zeros((k, C, features))
    seen = jax.lax.slice_in_dim(across_KCBHW, first * stride - above, last * stride - above + 1, stride, 3)
    return jnp.einsum("jcbhw,bhwo->jco", jax.lax.optimization_barrier(seen), d_BHWO[:, first:last + 1],
                      preferred_element_type=jnp.float32)


def patches(x_BHWC, k: int, stride: int):
    """What each output position sees, [B, H', W', P]."""
    rows, cols = (extent(n, k, stride) for n in x_BHWC.shape[1:3])
    across_BHWR = jnp.concatenate(shifted(x_BHWC, 2, cols, k, stride), -1)
    return jnp.concatenate(shifted(across_BHWR, 1, rows, k, stride), -1)


def shifted(x, axis: int, outputs: int, k: int, stride: int):
    """What so many outputs along an axis, padded, see by each of k taps."""
    x = jnp.pad(x, [(k // 2, k // 2) if i == axis else (0, 0) for i in range(x.ndim)])
    return [jax.lax.slice_in_dim(x, i, i + stride * (outputs - 1) + 1, stride, axis) for i in range(k)]


def extent(n: int, k: int, stride: int) -> int:
    """Outputs along n inputs."""
    return (n + 2 * (k // 2) - k) // stride + 1


def needed(sides, k: int, stride: int):
    """A scope in which FLOPs of a product with taps along these sides are those that do not meet padding."""
    both = [(n, extent(n, k, stride)) for n in sides]
    return flops.padded(math.prod(flops.taps(n, k, m, stride, k // 2) for n, m in both),
                        math.prod(m * k for _, m in both))
