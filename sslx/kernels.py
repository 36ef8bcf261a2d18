"""Fused attention: kernels that never hold the T x S products. `layers.attention` takes the one that fits.

B batch, T S time of queries and keys, G key-value heads, R query heads per key-value head, K head dim.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sslx.sharding import spec

LANES = 128                 # of a TPU vector register: what splash's blocks are multiples of
BLOCKS = (1024, 512, 256, LANES)  # large blocks amortize the rescaling of partial sums


def fused(platform: str, T: int, S: int, K: int, dtype) -> str | None:
    """The kernel for these shapes: "splash" on TPU, "cudnn" on GPU, None where there is none.

    Short sequences are faster in plain products, which XLA fuses with their neighbours.
    """
    if platform == "tpu" and T % LANES == S % LANES == K % LANES == 0 and S >= 1024:
        return "splash"
    if platform == "gpu" and jnp.dtype(dtype).itemsize == 2 and K % 8 == 0 and K <= 128 and S >= 256:
        return "cudnn"
    return None


def causal_parts(platform: str, T: int) -> int:
    """In how many parts plain causal attention goes through its queries, each with the keys up to its last.

    A CPU spends as long on what the mask hides as on the rest, of which four parts leave out 3/8 (a third less time
    at T 256, forward and backward). Short sequences are not worth it, nor are accelerators, which want few large
    products.
    """
    return 4 if platform == "cpu" and T % 4 == 0 and T >= 128 else 1


def splash(q_BTGRK, k_BSGK, v_BSGK, times_T: np.ndarray, *, causal: bool, window: int | None, segments) -> jax.Array:
    """JAX's splash attention for TPU, which skips blocks that the mask hides; heads over `tensor`, T over `context`.

    The queries have these times, the keys 0 .. S-1.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    B, T, G, R, K = q_BTGRK.shape
    mesh = jax.sharding.get_abstract_mesh()
    attend = splash_kernel(times_T, k_BSGK.shape[1], G * R, causal, window)
    heads, keys = spec("batch", "heads", "sequence"), spec("batch", "heads")
    ids = segments and (spec("batch", "sequence"), spec("batch"))

    def local(attend, q_BHTK, k_BGSK, v_BGSK, segments):
        return jax.vmap(attend)(q_BHTK, k_BGSK, v_BGSK, segments and SegmentIds(*segments))

    # Each device holds the rows of the mask that it computes.
    shards = attend.manual_sharding_spec(NamedSharding(mesh, spec("heads", "sequence")))
    cut = (shards, heads, keys, keys, ids)
    q_BHTK = (q_BTGRK * K**-0.5).reshape(B, T, G * R, K).swapaxes(1, 2)
    arguments = (attend, q_BHTK, k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2), segments)
    y_BHTK = jax.shard_map(local, in_specs=cut, out_specs=heads, check_vma=False)(
        *jax.tree.map(jax.sharding.reshard, arguments, cut))
    return y_BHTK.swapaxes(1, 2).reshape(q_BTGRK.shape)


def splash_kernel(times_T: np.ndarray, S: int, heads: int, causal: bool, window: int | None):
    """The kernel for queries of these times, whose rows of the mask lie over `context`, and its heads over `tensor`."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, mesh = len(times_T), jax.sharding.get_abstract_mesh()
    mask: masks.Mask = masks.FullMask((T, S))
    if causal or window is not None:
        sides = None if window is None else (window - 1, 0 if causal else window - 1)
        mask = masks.CausalMask((T, S)) if sides is None else masks.LocalMask((T, S), sides, offset=0)
        mask.q_sequence = times_T
    # A block of queries lies on one device and, where such blocks are wide enough, in one stretch of time.
    ends = 1 + np.flatnonzero(np.diff(times_T) != 1)
    stretch = math.gcd(T // mesh.shape["context"], *ends.tolist())
    q_block = next((b for b in BLOCKS if stretch % b == 0), LANES)
    kv_block = next(b for b in BLOCKS if S % b == 0)
    sizes = kernel.BlockSizes(q_block, kv_block, block_q_dkv=q_block, block_kv_dkv=kv_block, use_fused_bwd_kernel=True)
    return kernel.make_splash_mha(masks.MultiHeadMask([mask] * heads), block_sizes=sizes,
                                  head_shards=mesh.shape["tensor"], q_seq_shards=mesh.shape["context"])


def cudnn(q_BTGRK, k_BSGK, v_BSGK, *, causal: bool, window: int | None) -> jax.Array:
    """cuDNN's flash attention; heads over `tensor`. `context` must be one device."""
    B, T, G, R, K = q_BTGRK.shape
    sides = None if window is None else (window - 1, 0 if causal else window - 1)

    def local(q_BTHK, k_BSGK, v_BSGK):
        return jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, is_causal=causal, local_window_size=sides,
                                            implementation="cudnn")

    queries, keys = spec("batch", "sequence", "heads"), spec("batch", None, "heads")
    over_mesh = jax.shard_map(local, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False)
    return over_mesh(q_BTGRK.reshape(B, T, G * R, K), k_BSGK, v_BSGK).reshape(q_BTGRK.shape)
