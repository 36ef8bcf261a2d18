"""Layers: everything that knows how weights and activations lie on the mesh.

A weight names the logical axis of each of its dimensions and is born sharded by `sharding.RULES`; it is
gathered over `fsdp`, in the compute dtype, where it is used. Activations keep their rows over the data
axes, time over `context`, and heads, hidden units and vocabulary over `tensor`; where both sides of a product
are sharded on the contracted axis, `Linear` states the sharding of the sum. Between the products of a block
the residual stream is cut along time over `tensor` as well (Korthikanti et al. 2022), where time divides.

Shapes: B batch, T and S time or patches, D model, F hidden, H heads, G key-value heads, R query heads per
key-value head, K head dim, V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from sslx import channels, flops, kernels, mup, zigzag
from sslx.config import UserError
from sslx.convolution import convolve
from sslx.sharding import RULES, axis_size, gather, platform, residual, spec, spec_of, whole

Mask = Literal["causal", "bidirectional", "prefix"]
Remat = Literal["none", "dots", "attention", "full"]

ROPE = 10_000.0  # the base of rotary positions in text

POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            "attention": jax.checkpoint_policies.save_only_these_names("attention"),
            "full": None}


def weight(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...], axes: tuple[str | None, ...],
           n_in: int = 0, stacked: int = 0) -> jax.Array:
    """A float32 parameter of `module` whose dimensions have these logical axes.

    Its fan-in are `n_in` dimensions after the `stacked` ones, which count weights side by side (sslx/mup.py).
    Raises UserError if a dimension does not divide over its mesh axis.
    """
    path = "/".join((*module.path, name))
    for size, axis in zip(shape, axes, strict=True):
        devices = axis_size(axis) if axis else 1
        if size % devices:
            raise UserError(f"{path} {shape} has {size} along {axis!r}, which mesh.{RULES[axis]}={devices} does not"
                            f" divide; choose a multiple of {devices}, or a smaller mesh.{RULES[axis]}")
    fans = mup.Fans(math.prod(shape[stacked:stacked + n_in]), math.prod(shape[stacked + n_in:]), *mup.stack.get())
    if (noted := mup.noted.get()) is not None:  # abstract: the parameter is an array of the shape of its fans
        noted.append((path, fans))
        module.param(name, lambda key: jnp.zeros(fans))
        return jnp.zeros(shape, jnp.float32, out_sharding=spec(*axes))
    return module.param(name, mup.born(init, path, fans), shape, jnp.float32, spec(*axes))


def matrix(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], n_in: int = 1,
           scale: float = 1.0, stacked: int = 0) -> jax.Array:
    """A `weight` that is born with variance scale² / fan-in."""
    return weight(module, name, fan_in(n_in, scale, stacked), shape, axes, n_in, stacked)


def fan_in(n_in: int = 1, scale: float = 1.0, stacked: int = 0) -> Callable:
    """Truncated normal of variance scale² / fan-in, the fan-in being `n_in` dimensions after the `stacked` ones."""

    def init(key, shape, dtype, out_sharding):
        std = scale / math.sqrt(math.prod(shape[stacked:stacked + n_in]))
        return std / 0.87962566 * jax.random.truncated_normal(key, -2, 2, shape, dtype, out_sharding=out_sharding)

    return init


class Linear(nn.Module):
    """y = x w + b over the last `n_in` dimensions of x; `features` may be several dimensions."""

    features: int | tuple[int, ...]
    axes: tuple[str | None, ...]
    n_in: int = 1
    bias: bool = True
    scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        features = (self.features,) if isinstance(self.features, int) else self.features
        shape = (*x.shape[-self.n_in:], *features)
        w = matrix(self, "kernel", shape, self.axes, self.n_in, self.scale)
        in_axes, out_axes = self.axes[:self.n_in], self.axes[self.n_in:]
        summed = any(RULES[a] == "tensor" for a in in_axes)
        out = None
        if summed:  # rows of tokens go back to the residual stream
            out = residual(x.shape[1]) if x.ndim - self.n_in == 2 else spec("batch", *(None,) * len(features))
        contracted, kept = "abc"[:self.n_in], "xyz"[:len(features)]
        y = jnp.einsum(f"...{contracted},{contracted}{kept}->...{kept}", x.astype(self.dtype),
                       gather(w.astype(self.dtype)), out_sharding=out)
        y = computed_once(y)
        if self.bias:
            b = weight(self, "bias", nn.initializers.zeros, features, out_axes)
            y = channels.plus(y, gather(b.astype(self.dtype)))
        return y


class Embed(nn.Module):
    """A table [V, D] to look token ids up in; `rows` is what hidden states are scored against (`scores`, `nll`)."""

    size: int
    width: int
    dtype: Any = jnp.float32
    parameter: str = "embedding"
    std: float = 0.02

    def setup(self):
        init, shape = nn.initializers.normal(self.std), (self.size, self.width)
        self.rows = weight(self, self.parameter, init, shape, ("vocab", "embed"), stacked=1)

    def __call__(self, ids_BT):
        return gather(self.rows.astype(self.dtype)).at[ids_BT].get(out_sharding=residual(ids_BT.shape[1]))


class Norm(nn.Module):
    """LayerNorm (x - mean) / std * g + b, or RMSNorm x / rms * g, over the last dimension in float32."""

    kind: Literal["layer", "rms"] = "layer"
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        if self.kind == "layer":
            x32 = x32 - x32.mean(-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.epsilon)
        scale = weight(self, "scale", nn.initializers.ones, x.shape[-1:], (None,))
        if self.kind == "layer":
            y = channels.affine(y, scale, weight(self, "bias", nn.initializers.zeros, x.shape[-1:], (None,)))
        else:
            y = channels.times(y, scale)
        return y.astype(x.dtype)


def rope(x, positions_BTA, base: float = ROPE):
    """Rotary positions: pairs (x_i, x_{i + K/2}) turned by position * base^(-2 i / K) (Su et al. 2021).

    x [B, T, ..., K] float; positions [B or 1, T], or [B or 1, T, A] of A axes, each of which turns its part of the
    pairs: i counts those of an axis then, of which there are K/2 / A.
    """
    if positions_BTA.ndim == 2:
        positions_BTA = positions_BTA[..., None]
    half, A = x.shape[-1] // 2, positions_BTA.shape[-1]
    angle = positions_BTA[..., None] * base ** (-jnp.arange(half // A, dtype=jnp.float32) / (half // A))
    angle = angle.reshape(*angle.shape[:2], *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def visible(mask: Mask, times_T, S: int, window: int | None = None, prefix_B=None, segments: tuple | None = None):
    """Which keys 0 .. S-1 the queries of these times see: bool [1 or B, T, S], or None for all.

    causal: s <= t. window: |t - s| < window. prefix: s < prefix_B as well. segments: (of queries [B, T], of keys
    [B, S]) must be equal.
    """
    ahead_TS = jnp.arange(S) - times_T[:, None]
    seen = None
    if mask != "bidirectional":
        seen = (ahead_TS <= 0)[None]
    if window is not None:
        near = (jnp.abs(ahead_TS) < window)[None]
        seen = near if seen is None else seen & near
    if mask == "prefix":
        seen = seen | (jnp.arange(S) < prefix_B[:, None, None])
    if segments is not None:
        same = segments[0][:, :, None] == segments[1][:, None, :]
        seen = same if seen is None else seen & same
    return seen


def needed_pairs(mask: Mask, times_T: np.ndarray, S: int, window: int | None) -> int:
    """Pairs of queries of these times and keys 0 .. S-1 that a mask leaves. Prefixes and segments are data: all."""
    reach = window or S
    behind_T = np.minimum(times_T + 1, reach)
    ahead_T = 0 if mask == "causal" else np.clip(S - 1 - times_T, 0, reach - 1)
    return int((behind_T + ahead_T).sum())


def attention(q_BTGRK, k_BSGK, v_BSGK, *, mask: Mask, window: int | None = None, prefix_B=None, segments=None,
              bias_GRTS=None, zigzagged: bool = False):
    """softmax(q k^T / sqrt(K) + bias, over visible keys) v, float32 inside; [B, T, G, R, K] in the dtype of q.

    Keys and values are gathered over `context`. A fused kernel where there is one for the mesh's devices, the mask
    and the shapes, else plain products. Rows that see no key do not occur: a query sees at least itself.
    zigzagged: queries, keys and values come in zigzag order, and so do the queries' side of `segments` and `bias_GRTS`;
    the keys' side is in order of time.
    """
    T, S = q_BTGRK.shape[1], k_BSGK.shape[1]
    k_BSGK, v_BSGK = (jax.sharding.reshard(x, spec("batch", None, "heads")) for x in (k_BSGK, v_BSGK))
    if zigzagged:
        k_BSGK, v_BSGK = zigzag.restore(k_BSGK), zigzag.restore(v_BSGK)
    times_T = zigzag.times(T) if zigzagged else np.arange(T, dtype=np.int32)
    kernel = kernels.fused(platform(), T // axis_size("sequence"), S, q_BTGRK.shape[-1], q_BTGRK.dtype)
    if bias_GRTS is None and mask != "prefix":
        causal = mask == "causal"
        if kernel == "splash":
            with flops.scaled(needed_pairs(mask, times_T, S, window), T * S):
                return kernels.splash(q_BTGRK, k_BSGK, v_BSGK, times_T, causal=causal, window=window,
                                      segments=segments)
        if kernel == "cudnn" and segments is None and axis_size("sequence") == 1:
            return kernels.cudnn(q_BTGRK, k_BSGK, v_BSGK, causal=causal, window=window)
    parts = kernels.causal_parts(platform(), T) if mask == "causal" and axis_size("sequence") == 1 else 1
    y = []
    for i in range(parts):  # rows of queries, each with the keys up to its last
        row, seen = slice(T * i // parts, T * (i + 1) // parts), slice(S * (i + 1) // parts)
        y.append(products(q_BTGRK[:, row], k_BSGK[:, seen], v_BSGK[:, seen], times_T[row], S, mask=mask, window=window,
                          prefix_B=prefix_B, segments=segments and (segments[0][:, row], segments[1][:, seen]),
                          bias_GRTS=None if bias_GRTS is None else bias_GRTS[:, :, row, seen]))
    return y[0] if parts == 1 else jnp.concatenate(y, 1)


def products(q_BTGRK, k_BSGK, v_BSGK, times_T, n_keys: int, *, mask: Mask, window, prefix_B, segments, bias_GRTS):
    """What `attention` returns, in plain products of queries of these times with keys 0 .. S-1, the first of n_keys."""
    T, S = len(times_T), k_BSGK.shape[1]
    pairs = (needed_pairs(mask, times_T, S, window), T * S, T * n_keys)
    with flops.scaled(*pairs):
        logits = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    logits = logits / math.sqrt(q_BTGRK.shape[-1])
    if bias_GRTS is not None:
        logits = logits + bias_GRTS
    seen = visible(mask, times_T, S, window, prefix_B, segments)
    if seen is not None:
        logits = jnp.where(seen[:, None, None], logits, -1e30)
    p = jax.nn.softmax(logits, -1).astype(q_BTGRK.dtype)
    with flops.scaled(*pairs):
        return jnp.einsum("bgrts,bsgk->btgrk", p, v_BSGK)


class Attention(nn.Module):
    """Multi-head attention; grouped queries if kv_heads < heads; onto `memory` if it is given.

    head_growth: K over that of the muP base. Keys learn to align with queries, and their products to grow as K.
    """

    heads: int
    kv_heads: int
    head_growth: float
    bias: bool
    qk_norm: bool
    rope: float | None
    window: int | None
    out_scale: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD, memory_BSD=None, *, positions=None, bias_GRTS=None, **masking):
        width = x_BTD.shape[-1]
        G, R, K = self.kv_heads, self.heads // self.kv_heads, width // self.heads

        def project(n, name, x):
            return Linear((G, n, K), ("embed", "heads", None, None), bias=self.bias, dtype=self.dtype, name=name)(x)

        # Apart, so that in ZeRO-3 the one is gathered while the other is computed.
        q, kv = project(R, "q", x_BTD), project(2, "kv", x_BTD if memory_BSD is None else memory_BSD)
        k, v = kv[..., 0, :], kv[..., 1, :]
        if self.qk_norm:
            q, k = Norm("rms", name="q_norm")(q), Norm("rms", name="k_norm")(k)
        if self.rope:
            q, k = rope(q, positions, self.rope), rope(k, positions, self.rope)
        q = q / math.sqrt(self.head_growth)
        y = checkpoint_name(attention(q, k, v, bias_GRTS=bias_GRTS, window=self.window, **masking), "attention")
        return Linear(width, ("heads", None, None, "embed"), n_in=3, bias=self.bias, scale=self.out_scale,
                      dtype=self.dtype, name="out")(y)


class Mlp(nn.Module):
    """w2 gelu(w1 x), or SwiGLU w2 (silu(w1 x) * w3 x) (Shazeer 2020)."""

    hidden: int
    kind: Literal["gelu", "swiglu"]
    bias: bool
    out_scale: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        if self.kind == "gelu":
            h = nn.gelu(Linear(self.hidden, ("embed", "hidden"), bias=self.bias, dtype=self.dtype, name="up")(x))
        else:
            axes = ("embed", None, "hidden")
            gate_up = Linear((2, self.hidden), axes, bias=self.bias, dtype=self.dtype, name="up")(x)
            h = nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
        return Linear(x.shape[-1], ("hidden", "embed"), bias=self.bias, scale=self.out_scale, dtype=self.dtype,
                      name="down")(h)


class Experts(nn.Module):
    """A mixture of SwiGLU experts: y_t = sum of p_te MLP_e(x_t) over the top_k experts e of t (Shazeer et al. 2017).

    p are the router's top_k probabilities, normed to sum to one. An expert takes at most `capacity` times its even
    share, top_k T / n, of the tokens of a row, first choices first, then by time; the others pass it by. Which these
    are depends on their row alone, and so not on the mesh. `shared` experts' worth of hidden units see every token (Dai
    et al. 2024).
    The gradient of balance * n sum_e f_e P_e, f the shares of choices and P the mean probabilities of the global batch
    (Fedus et al. 2022), is added to the loss's, whose value stays as it is.

    Experts lie over `expert`: each device sends its rows' tokens to where their experts are, and gets them back.
    N choices of a row (T for each of the top_k), E experts, C places of an expert.
    """

    n: int
    top_k: int
    hidden: int
    capacity: float
    shared: int
    balance: float
    out_scale: float
    dtype: Any

    @nn.compact
    def __call__(self, tokens_BTD, zigzagged: bool = False):
        T, D = tokens_BTD.shape[1:]
        E, K, N = self.n, self.top_k, self.top_k * T
        C = min(T, math.ceil(self.capacity * N / E))
        x_BTD = whole(tokens_BTD)
        if zigzagged:
            x_BTD = zigzag.restore(x_BTD)
        routed = Linear(E, ("embed", None), bias=False, name="router")(x_BTD)  # in float32: choices are discrete
        p_BTE = jax.nn.softmax(routed)
        gate_BTK, expert_BTK = jax.lax.top_k(p_BTE, K)
        gate_BTK = gate_BTK / gate_BTK.sum(-1, keepdims=True)
        # In the order of choice, then of time.
        expert_BN = jnp.concatenate([expert_BTK[..., k] for k in range(K)], 1)
        chosen_BNE = jax.nn.one_hot(expert_BN, E, dtype=jnp.int32)
        count_BE = chosen_BNE.sum(1)
        penalty = E * (count_BE.mean(0) / N * p_BTE.mean((0, 1))).sum()
        x_BTD = with_penalty(x_BTD, self.balance * penalty)

        # Sorted by expert, an expert's choices stand in a row, from its start on.
        start_BE = jnp.cumsum(count_BE, 1) - count_BE
        sorted_BN = jnp.argsort(expert_BN, 1, stable=True)
        place_BN = jnp.argsort(sorted_BN, 1) - jnp.take_along_axis(start_BE, expert_BN, 1)
        source_BEC = jnp.minimum(start_BE[..., None] + jnp.arange(C), N - 1)
        token_BZ = jnp.take_along_axis(sorted_BN, source_BEC.reshape(-1, E * C), 1) % T
        taken_BEC = jnp.arange(C) < count_BE[..., None]
        x_BECD = jnp.take_along_axis(x_BTD, token_BZ[..., None], 1).reshape(-1, E, C, D)
        y_BECD = self.experts(x_BECD.astype(self.dtype) * taken_BEC[..., None].astype(self.dtype), needed=(N, E * C))

        from_BN = expert_BN * C + jnp.minimum(place_BN, C - 1)
        y_BND = jnp.take_along_axis(y_BECD.reshape(-1, E * C, D), from_BN[..., None], 1)
        gate_BN = jnp.concatenate([gate_BTK[..., k] for k in range(K)], 1) * (place_BN < C)
        y_BND = y_BND * gate_BN[..., None].astype(self.dtype)
        first, *others = jnp.split(y_BND, K, 1)
        y_BTD = sum(others, first)
        if zigzagged:
            y_BTD = zigzag.arrange(y_BTD)
        y_BTD = jax.sharding.reshard(y_BTD, residual(T))
        if not self.shared:
            return y_BTD
        hidden = self.shared * self.hidden
        return y_BTD + Mlp(hidden, "swiglu", False, self.out_scale, self.dtype, name="shared")(tokens_BTD)

    def experts(self, x_BECD, needed):
        E, D, F = self.n, x_BECD.shape[-1], self.hidden
        w_up = matrix(self, "up", (E, D, 2, F), ("experts", "expert_embed", None, "hidden"), stacked=1)
        axes = ("experts", "hidden", "expert_embed")
        w_down = matrix(self, "down", (E, F, D), axes, scale=self.out_scale, stacked=1)
        rows, there = spec("batch"), P(("data", "fsdp"), "expert")
        x_BECD = jax.sharding.reshard(x_BECD, there)
        with flops.padded(min(needed), needed[1]):
            h = jnp.einsum("becd,edgf->becgf", x_BECD, gather(w_up.astype(self.dtype)))
            h_BECF = nn.silu(h[..., 0, :]) * h[..., 1, :]
            y_BECD = jnp.einsum("becf,efd->becd", h_BECF, gather(w_down.astype(self.dtype)), out_sharding=there)
        return jax.sharding.reshard(y_BECD, rows)


@jax.custom_vjp
def with_penalty(x, penalty):
    """x, whose gradient brings along that of `penalty`, as if the penalty were added to the loss."""
    return x


with_penalty.defvjp(lambda x, penalty: (x, None), lambda _, g: (g, jnp.float32(1)))


def computed_once(x):
    """x, by a barrier for it and its gradient on CPU, where XLA would recompute what makes them in every consumer."""
    return jax.lax.optimization_barrier(x) if platform() == "cpu" else x


def add(x, update, scale: float):
    """x + scale * update."""
    return computed_once(x + scale * update)


def skipping(key, x_BTD, branch: Callable, n: int, of: int):
    """What a branch makes of the rows but `n` of every `of`, drawn anew, for which it is 0 and costs nothing.

    The others are divided by the share that is kept, so that the mean is as without (Huang et al. 2016; that dropped
    rows are not computed: Oquab et al. 2024). Rows are taken among neighbours, and stay on their device.
    Raises UserError if a device has other than a multiple of `of` rows.
    """
    B, kept = len(x_BTD), of - n
    if B % (of * axis_size("batch")):
        raise UserError(f"model.drop_group={of} does not divide the {B} views of a batch over {axis_size('batch')}"
                        " devices (mesh data x fsdp); choose a divisor of those on a device")
    rows = functools.partial(jnp.reshape, out_sharding=P(RULES["batch"], *spec_of(x_BTD)[1:]))
    groups = functools.partial(jnp.reshape, out_sharding=P(RULES["batch"], None, *spec_of(x_BTD)[1:]))
    order_GR = jnp.argsort(jax.random.uniform(key, (B // of, of), out_sharding=spec("batch")), 1)
    place_GR = jnp.argsort(order_GR, 1)
    x_GRTD = groups(x_BTD, (-1, of, *x_BTD.shape[1:]))
    taken_GRTD = jnp.take_along_axis(x_GRTD, order_GR[:, :kept, None, None], 1)
    y_BTD = branch(rows(taken_GRTD, (-1, *x_BTD.shape[1:])))
    y_GRTD = groups(y_BTD, (-1, kept, *y_BTD.shape[1:]))
    back_GRTD = jnp.take_along_axis(y_GRTD, jnp.minimum(place_GR, kept - 1)[..., None, None], 1)
    y_GRTD = jnp.where((place_GR < kept)[..., None, None], back_GRTD * (of / kept), 0).astype(y_BTD.dtype)
    return rows(y_GRTD, x_BTD.shape)


def gather_time(x_BTD):
    """A residual stream whole over `tensor`, as products with weights take it."""
    return jax.sharding.reshard(x_BTD, spec("batch", "sequence", None))


class Block(nn.Module):
    """A pre-norm transformer block: self-attention, attention onto `memory` if there is one, MLP or experts.

    branch_scale: of what each of these adds to the residual stream; out_scale: of the weights that make it, at birth.
    layer_scale:  at birth, of what each feature of a branch is multiplied by (Touvron et al. 2021); None: by nothing.
    drop:         (n, of): stochastic depth, by which n of every so many rows of a batch skip a branch (`skipping`).
    """

    heads: int
    kv_heads: int | None = None
    head_growth: float = 1.0
    hidden: int | None = None
    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    qk_norm: bool = False
    rope: float | None = None
    window: int | None = None
    experts: dict[str, Any] | None = None
    out_scale: float = 1.0
    branch_scale: float = 1.0
    layer_scale: float | None = None
    drop: tuple[int, int] = (0, 1)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD, memory_BSD, masking):
        common = dict(heads=self.heads, kv_heads=self.kv_heads or self.heads, head_growth=self.head_growth,
                      bias=self.bias, qk_norm=self.qk_norm, out_scale=self.out_scale, dtype=self.dtype)

        def attend(x_BTD):
            h = gather_time(Norm(self.norm, name="attention_norm")(x_BTD))
            attention = Attention(**common, rope=self.rope, window=self.window, name="attention")
            return self.scaled(attention(h, **masking), "attention_scale")

        x_BTD = self.plus(x_BTD, attend)
        if memory_BSD is not None:
            h = gather_time(Norm(self.norm, name="cross_norm")(x_BTD))
            cross = Attention(**common, rope=None, window=None, name="cross")
            x_BTD = add(x_BTD, cross(h, memory_BSD, mask="bidirectional"), self.branch_scale)

        def transform(x_BTD):
            h = gather_time(Norm(self.norm, name="mlp_norm")(x_BTD))
            hidden = self.hidden or 4 * x_BTD.shape[-1]
            if self.experts:
                mlp = Experts(**self.experts, hidden=hidden, out_scale=self.out_scale, dtype=self.dtype, name="experts")
                return mlp(h, masking["zigzagged"])
            mlp = Mlp(hidden, self.mlp, self.bias, self.out_scale, self.dtype, name="mlp")
            return self.scaled(mlp(h), "mlp_scale")

        return self.plus(x_BTD, transform)

    def scaled(self, y_BTD, name: str):
        if self.layer_scale is None:
            return y_BTD
        init = nn.initializers.constant(self.layer_scale)
        return channels.times(y_BTD, weight(self, name, init, y_BTD.shape[-1:], (None,)).astype(y_BTD.dtype))

    def plus(self, x_BTD, branch: Callable):
        """x and what a branch makes of it; in training without some of the rows."""
        n, of = self.drop
        if not n or not self.has_rng("drop"):
            return add(x_BTD, branch(x_BTD), self.branch_scale)
        return add(x_BTD, skipping(self.make_rng("drop"), x_BTD, branch, n, of), self.branch_scale)


def queries_in_zigzag(*, positions=None, segments=None, bias_GRTS=None):
    """What `attention` is told of its tokens, the queries' side in zigzag order."""
    return dict(positions=None if positions is None else zigzag.arrange(positions),
                segments=None if segments is None else (zigzag.arrange(segments[0]), segments[1]),
                bias_GRTS=None if bias_GRTS is None else zigzag.arrange(bias_GRTS, axis=2))


class Stack(nn.Module):
    """`depth` blocks: scanned with stacked weights or unrolled, with a rematerialization policy.

    remat: "none" keeps all activations, "dots" the products with weights, "attention" the residual stream and what
           attention returns, "full" the residual stream alone.
    The result is whole over `tensor`, and cut along time over `context`. In between, time is in zigzag order if the
    mask is causal; with a window every part of time has its share already.
    base_depth: of the muP base, for which the blocks are born; each then adds base_depth / depth of what it makes.
    """

    depth: int
    block: dict[str, Any]
    scan: bool = True
    remat: Remat = "none"
    base_depth: int | None = None

    @nn.compact
    def __call__(self, x_BTD, memory_BSD=None, *, mask: Mask, **masking):
        x_BTD = jax.sharding.reshard(x_BTD, residual(x_BTD.shape[1]))
        zigzagged = mask == "causal" and not self.block.get("window") and zigzag.helps(x_BTD)
        if zigzagged:
            x_BTD, masking = zigzag.scatter(x_BTD), queries_in_zigzag(**masking)

        # These are not arrays, so they are closed over: what scan and remat pass on must be.
        def body(block, x, memory, masking):
            return block(x, memory, masking | {"mask": mask, "zigzagged": zigzagged})

        base_depth = self.base_depth or self.depth
        options = dict(self.block, out_scale=1 / math.sqrt(2 * base_depth), branch_scale=base_depth / self.depth)
        if self.remat != "none":
            body = nn.remat(body, prevent_cse=not self.scan, policy=POLICIES[self.remat])
        with mup.during(mup.stack, (self.depth, base_depth)):
            if self.scan:
                def step(block, x, memory, masking):
                    return body(block, x, memory, masking), None

                scanned = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True, "drop": True},
                                  length=self.depth, in_axes=(nn.broadcast, nn.broadcast))
                x_BTD = scanned(Block(**options, name="blocks"), x_BTD, memory_BSD, masking)[0]
            else:
                if not self.is_initializing():
                    body = nn.jit(body)  # traced once, not for each block
                for i in range(self.depth):
                    x_BTD = body(Block(**options, name=f"block_{i}"), x_BTD, memory_BSD, masking)
        return gather_time(zigzag.collect(x_BTD) if zigzagged else x_BTD)


class Conv(nn.Module):
    """A convolution without bias, [B, H, W, C] -> [B, H', W', features], padded by kernel // 2."""

    features: int
    kernel: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC):
        shape, axes = (self.kernel, self.kernel, x_BHWC.shape[-1], self.features), (None, None, None, "embed")
        w = matrix(self, "kernel", shape, axes, 3, math.sqrt(2))
        return convolve(x_BHWC.astype(self.dtype), gather(w.astype(self.dtype)), self.stride)


class BatchNorm(nn.Module):
    """(x - mean) / std over all but the last dimension of the global batch (Ioffe & Szegedy 2015).

    With `train` the statistics are those of the batch, and their running mean, kept in the collection
    "batch_stats", moves on; otherwise they are the running ones.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(self, x, *, train: bool):
        x32, shape = x.astype(jnp.float32), x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        if train:
            mean, var = channels.moments(x32)
            # Initialized with the statistics of its first batch, a random network is a fair baseline.
            momentum = 0.0 if self.is_initializing() else self.momentum
            for running, value in ((running_mean, mean), (running_var, var)):
                running.value = momentum * running.value + (1 - momentum) * jax.lax.stop_gradient(value)
        else:
            mean, var = running_mean.value, running_var.value
        scale = jax.lax.rsqrt(var + self.epsilon)
        shift = -mean * scale
        if self.affine:
            learnt = weight(self, "scale", nn.initializers.ones, shape, (None,))
            scale, shift = scale * learnt, shift * learnt
            shift += weight(self, "bias", nn.initializers.zeros, shape, (None,))
        return channels.affine(x32, scale, shift).astype(x.dtype)


def scores(x_BTD, table_VD):
    """Logits [B, T, V] of a table as an `Embed` keeps it: a head."""
    return jnp.einsum("btd,vd->btv", x_BTD, gather(table_VD.astype(x_BTD.dtype)))


def nll(x_BTD, table_VD, targets_BT, chunks: int = 1):
    """-log softmax(x table^T)[target], float32 [B, T].

    With `chunks`, parts c of the vocabulary are gathered and scored in turn, so that neither all logits nor a whole
    table or its gradient exist at a time: log sum_v exp = log sum_c exp (log sum_{v in c} exp).

    Raises UserError if `chunks` does not divide a device's part of the vocabulary.
    """
    if chunks == 1:
        return cross_entropy(scores(x_BTD, table_VD), targets_BT)
    V, D = table_VD.shape
    N = axis_size("vocab")  # devices, each of which has some of the words of every part
    if V % (N * chunks):
        raise UserError(f"model.loss_chunks={chunks} x mesh.{RULES['vocab']}={N} does not divide a vocabulary of {V};"
                        " choose divisors, or a larger model.vocab_size")
    shape, dtype = (N, chunks, V // N // chunks), x_BTD.dtype
    ids_CNV = jnp.arange(V).reshape(shape).swapaxes(0, 1)
    table_NCVD = jnp.reshape(table_VD, (*shape, D), out_sharding=spec("vocab", None, None, "embed"))
    # In float32, so that the gradients of the parts are summed in it; each part's product has the compute dtype.
    x32_BTD = x_BTD.astype(jnp.float32)

    @jax.checkpoint
    def part(_, inputs):
        ids_NV, table_NVD = inputs
        logits = jnp.einsum("btd,nvd->btnv", x32_BTD.astype(dtype), gather(table_NVD.astype(dtype)))
        logits = logits.astype(jnp.float32)
        chosen = jnp.where(ids_NV == targets_BT[..., None, None], logits, 0).sum((-2, -1))
        return None, (jax.nn.logsumexp(logits, (-2, -1)), chosen)

    # Two in a row, so that the second is gathered while the first is computed; JAX 0.10 cannot trace an odd rest.
    parts = (ids_CNV, table_NCVD.swapaxes(0, 1))
    lse_CBT, chosen_CBT = jax.lax.scan(part, None, parts, unroll=1 if chunks % 2 else 2)[1]
    return jax.nn.logsumexp(lse_CBT, 0) - chosen_CBT.sum(0)


def cross_entropy(logits, targets):
    """-log softmax(logits)[target], float32; logits [..., V] may be sharded over V, targets int [...]."""
    chex.assert_equal_shape_prefix([logits, targets], targets.ndim)
    logits = logits.astype(jnp.float32)
    ids = jax.lax.broadcasted_iota(jnp.int32, (logits.shape[-1],), 0)
    chosen = jnp.where(ids == targets[..., None], logits, 0).sum(-1)
    return jax.nn.logsumexp(logits, -1) - chosen
