"""The encoder-decoder of T5 (Raffel et al. 2020), with relative position biases or rotary positions.

B batch, S source, T target, D model, H heads, V vocabulary.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from sslx.config import Count
from sslx.layers import ROPE, Embed, Norm, Remat, Stack, nll, scores, weight
from sslx.models import Base, check_heads

N_BUCKETS, FARTHEST = 32, 128


def buckets(T: int, S: int, both_ways: bool) -> jax.Array:
    """The bucket of key s seen from query t, int32 [T, S]: exact near, logarithmic to `FARTHEST`, then one."""
    distance_TS = jnp.arange(T)[:, None] - jnp.arange(S)
    n = N_BUCKETS // 2 if both_ways else N_BUCKETS
    first = jnp.where(both_ways & (distance_TS < 0), n, 0)
    if both_ways:
        distance_TS = jnp.abs(distance_TS)
    distance_TS = jnp.maximum(distance_TS, 0)
    exact = n // 2
    growth = jnp.log(jnp.maximum(distance_TS, 1) / exact) / math.log(FARTHEST / exact)
    far_TS = jnp.minimum(exact + (growth * (n - exact)).astype(jnp.int32), n - 1)
    return first + jnp.where(distance_TS < exact, distance_TS, far_TS)


class RelativeBias(nn.Module):
    """A learned bias per head and distance bucket, shared by all layers of a stack: float32 [H, 1, T, S]."""

    heads: int
    both_ways: bool

    @nn.compact
    def __call__(self, T, S):
        table_NH = weight(self, "embedding", nn.initializers.normal(0.1), (N_BUCKETS, self.heads), (None, "heads"),
                          stacked=1)
        one_hot_TSN = jax.nn.one_hot(buckets(T, S, self.both_ways), N_BUCKETS)
        return jnp.einsum("tsn,nh->hts", one_hot_TSN, table_NH)[:, None]


class EncoderDecoder(nn.Module):
    """-log p(target) [B, T] of `targets` from `inputs` [B, S] and the targets before each."""

    modality = "text"

    vocab_size: int
    width: int
    depth: int
    decoder_depth: int
    block: dict[str, Any]
    position: Literal["relative", "rope"]
    tied: bool
    scan: bool
    remat: Remat
    loss_chunks: int
    dtype: Any
    base: Base

    def setup(self):
        self.tokens = Embed(self.vocab_size, self.width, self.dtype)
        self.encoder = Stack(self.depth, self.block, self.scan, self.remat, self.base.depth)
        self.decoder = Stack(self.decoder_depth, self.block, self.scan, self.remat,
                             self.base.decoder_depth or self.base.depth)
        self.encoder_norm, self.decoder_norm = Norm(self.block["norm"]), Norm(self.block["norm"])
        if self.position == "relative":
            heads = self.block["heads"]
            self.encoder_bias, self.decoder_bias = RelativeBias(heads, True), RelativeBias(heads, False)
        if not self.tied:
            self.head = Embed(self.vocab_size, self.width, self.dtype, parameter="kernel",
                              std=self.base.width**-0.5)

    def __call__(self, inputs_BS, targets_BT):
        """-log p(target t | inputs, targets before t), float32 [B, T]."""
        return nll(*self.readout(self.decode(self.encode(inputs_BS), targets_BT)), targets_BT, self.loss_chunks)

    def logits(self, inputs_BS, targets_BT):
        return scores(*self.readout(self.decode(self.encode(inputs_BS), targets_BT)))

    def encode(self, inputs_BS, segment_ids=None):
        """Memory [B, S, D]; with `segment_ids` int [B, S], tokens see their own document only."""
        S = inputs_BS.shape[1]
        masking = self.where(S, self.encoder_bias) if self.position == "relative" else self.where(S)
        if segment_ids is not None:
            masking["segments"] = (segment_ids, segment_ids)
        return self.encoder_norm(self.encoder(self.tokens(inputs_BS), mask="bidirectional", **masking))

    def decode(self, memory_BSD, targets_BT):
        """Hidden states [B, T, D]; position t sees targets before t (0 stands before the first)."""
        T = targets_BT.shape[1]
        shifted_BT = jnp.pad(targets_BT, ((0, 0), (1, 0)))[:, :-1]
        where = self.where(T, self.decoder_bias) if self.position == "relative" else self.where(T)
        return self.decoder_norm(self.decoder(self.tokens(shifted_BT), memory_BSD, mask="causal", **where))

    def readout(self, hidden_BTD):
        """What `scores` takes. Features learn to align with the table, and products to grow as the width."""
        table = self.tokens if self.tied else self.head
        return hidden_BTD / (self.width / self.base.width), table.rows

    def where(self, length, bias=None):
        """What tells the attention of a stack where its tokens are."""
        return dict(bias_GRTS=bias(length, length)) if bias is not None else dict(positions=jnp.arange(length)[None])


def make(*, vocab_size: Count, width: Count, depth: Count, heads: Count, decoder_depth: Count | None = None,
         hidden: Count | None = None, norm: Literal["layer", "rms"] = "rms", mlp: Literal["gelu", "swiglu"] = "gelu",
         position: Literal["relative", "rope"] = "relative", bias: bool = False, tied: bool = True, scan: bool = True,
         remat: Remat = "none", loss_chunks: Count = 1, dtype: Literal["float32", "bfloat16"] = "bfloat16",
         base: dict[str, Any] | None = None) -> EncoderDecoder:
    """An encoder-decoder; `decoder_depth` is `depth` if None, and may stand in `base`; the rest as in `transformer`.

    Relative biases belong to heads, so grouped queries are not offered here. Raises UserError for heads that do not
    divide the width.
    """
    check_heads(width, heads, rotary=position == "rope")
    tuned = Base.of(base, position == "rope", width=width, depth=depth, decoder_depth=decoder_depth, heads=heads,
                    hidden=hidden)
    block = dict(heads=heads, head_growth=width / heads / tuned.head, hidden=hidden, norm=norm, mlp=mlp, bias=bias,
                 rope=ROPE if position == "rope" else None, dtype=jnp.dtype(dtype))
    return EncoderDecoder(vocab_size, width, depth, decoder_depth or depth, block, position, tied, scan, remat,
                          loss_chunks, jnp.dtype(dtype), tuned)
