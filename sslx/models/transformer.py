"""A decoder or encoder over tokens: GPT-2-like, Llama-like or BERT-like by its arguments and its mask.

B batch, T time, D model, V vocabulary.
"""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from sslx import config
from sslx.config import Count, Natural, Nonnegative, Positive, UserError
from sslx.layers import ROPE, Embed, Mask, Norm, Remat, Stack, nll, scores
from sslx.models import Base, check_heads


class Transformer(nn.Module):
    """logits [B, T, V] = head(hidden), hidden [B, T, D] = norm(stack(embed(tokens) + positions))."""

    modality = "text"

    vocab_size: int
    max_length: int
    width: int
    depth: int
    block: dict[str, Any]
    position: Literal["learned", "rope", "none"]
    tied: bool
    scan: bool
    remat: Remat
    loss_chunks: int
    dtype: Any
    base: Base

    def setup(self):
        self.tokens = Embed(self.vocab_size, self.width, self.dtype)
        if self.position == "learned":
            self.positions = Embed(self.max_length, self.width, self.dtype)
        self.stack = Stack(self.depth, self.block, self.scan, self.remat, self.base.depth)
        self.norm = Norm(self.block["norm"])
        if not self.tied:
            self.head = Embed(self.vocab_size, self.width, self.dtype, parameter="kernel",
                              std=self.base.width**-0.5)

    def __call__(self, tokens_BT, mask: Mask, **options):
        return self.logits(self.hidden(tokens_BT, mask, **options))

    def hidden(self, tokens_BT, mask: Mask, *, prefix_B=None, segment_ids=None, positions=None):
        """Hidden states [B, T, D].

        mask:        "causal", "bidirectional", or "prefix": bidirectional over the first `prefix_B` tokens.
        segment_ids: int [B, T]; tokens see their own document only.
        positions:   int [B, T]; 0 .. T-1 if not given.
        """
        if positions is None:
            positions = jnp.arange(tokens_BT.shape[1])[None]
        x_BTD = self.tokens(tokens_BT)
        if self.position == "learned":
            x_BTD = x_BTD + self.positions(jnp.broadcast_to(positions, tokens_BT.shape))
        masking = dict(positions=positions)
        if mask == "prefix":
            masking["prefix_B"] = prefix_B
        if segment_ids is not None:
            masking["segments"] = (segment_ids, segment_ids)
        return self.norm(self.stack(x_BTD, mask=mask, **masking))

    def logits(self, hidden_BTD):
        return scores(*self.readout(hidden_BTD))

    def nll(self, hidden_BTD, targets_BT):
        """-log p(target), float32 [B, T]."""
        return nll(*self.readout(hidden_BTD), targets_BT, self.loss_chunks)

    def readout(self, hidden_BTD):
        """What `scores` takes. Features learn to align with the table, and products to grow as the width."""
        table = self.tokens if self.tied else self.head
        return hidden_BTD / (self.width / self.base.width), table.rows


def make(*, vocab_size: Count, max_length: Count, width: Count, depth: Count, heads: Count,
         kv_heads: Count | None = None, hidden: Count | None = None, norm: Literal["layer", "rms"] = "layer",
         mlp: Literal["gelu", "swiglu"] = "gelu", position: Literal["learned", "rope", "none"] = "learned",
         bias: bool = True, qk_norm: bool = False, window: Count | None = None,
         experts: dict[str, Any] | None = None, tied: bool = True, scan: bool = True, remat: Remat = "none",
         loss_chunks: Count = 1, dtype: Literal["float32", "bfloat16"] = "bfloat16",
         base: dict[str, Any] | None = None) -> Transformer:
    """A transformer; the defaults are GPT-2's.

    max_length:  positions, an upper bound of T.
    kv_heads:    fewer than `heads` for grouped-query attention.
    hidden:      of the MLP; 4 x width if None.
    window:      tokens see no farther than this; None for all.
    experts:     arguments of `mixture`: the MLPs become mixtures of SwiGLU experts of `hidden` units each.
    tied:        the head is the token embedding.
    scan:        one compiled block for all layers.
    remat:       what the backward pass recomputes (layers.Stack).
    loss_chunks: parts in which the loss computes the head's logits, never all at once.
    base:        width, depth, heads, kv_heads, hidden at which the optimizer's hyper-parameters were tuned; what is
                 left out is as here. With it the network is in muP and CompleteP (sslx/mup.py).

    Raises UserError for heads that do not divide the width.
    """
    check_heads(width, heads, kv_heads, rotary=position == "rope")
    tuned = Base.of(base, position == "rope", width=width, depth=depth, heads=heads, kv_heads=kv_heads, hidden=hidden)
    mixed = None if experts is None else config.call(mixture, experts, "config.model.experts")
    block = dict(heads=heads, kv_heads=kv_heads, head_growth=width / heads / tuned.head, hidden=hidden, norm=norm,
                 mlp=mlp, bias=bias, qk_norm=qk_norm, window=window, experts=mixed,
                 rope=ROPE if position == "rope" else None, dtype=jnp.dtype(dtype))
    return Transformer(vocab_size, max_length, width, depth, block, position, tied, scan, remat, loss_chunks,
                       jnp.dtype(dtype), tuned)


def mixture(*, n: Count, top_k: Count = 2, capacity: Positive = 1.25, shared: Natural = 0,
            balance: Nonnegative = 0.01) -> dict[str, Any]:
    """What `layers.Experts` is made with.

    n:        experts, of which a token takes `top_k`.
    capacity: places of an expert over its even share, which is 1; n / top_k drops no token.
    shared:   experts that every token takes.
    balance:  weight of the load-balance penalty, whose gradient alone is added.
    """
    if top_k > n:
        raise UserError(f"model.experts.top_k={top_k} must be from 1 to model.experts.n={n}")
    return dict(n=n, top_k=top_k, capacity=capacity, shared=shared, balance=balance)
