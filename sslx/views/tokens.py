"""Views of token sequences: masks, spans, and which patches an encoder keeps.

Everything has a static shape, and nothing scatters: chosen places are compared or gathered.

B batch, T time, K chosen positions, S spans, N slots of an output.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sslx import views
from sslx.config import UserError


def mask_positions(key: jax.Array, tokens_BT: jax.Array, *, rate: float, word_starts: Sequence[bool] | None = None,
                   valid: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Positions to predict, int32 [B, K] ascending, and their weights, float32 [B, K]; K = max(1, round(rate T)).

    Positions are drawn without replacement, uniformly. With `word_starts` (per token id, whether it begins a
    word) whole words are drawn, until K tokens are reached; the last word may be cut. With `valid` (bool
    [B, T], what may be masked) a row of n valid tokens has max(1, round(rate n)) positions of weight 1,
    valid ones (none if n = 0); the others weigh 0.

    Devlin et al. 2019.
    """
    batch, length = tokens_BT.shape
    k = max(1, round(rate * length))
    priority_BT = views.uniform(key, (batch, length))
    if word_starts is not None:
        starts_BT = look_up(jnp.asarray(word_starts), tokens_BT)
        first_BT = jax.lax.cummax(jnp.where(starts_BT, jnp.arange(length), 0), axis=1)
        priority_BT = jnp.take_along_axis(priority_BT, first_BT, 1)
    if valid is None:
        positions_BK = jax.lax.top_k(priority_BT, k)[1]
        return jnp.sort(positions_BK, 1), jnp.ones_like(positions_BK, jnp.float32)
    positions_BK = jax.lax.top_k(jnp.where(valid, priority_BT, -1.0), k)[1]
    budgets = jnp.array([min(n, max(1, round(rate * n))) for n in range(length + 1)])
    budget_B1 = look_up(budgets, valid.sum(1, keepdims=True))
    weights_BK = (jnp.arange(k) < budget_B1).astype(jnp.float32)
    order_BK = jnp.argsort(positions_BK, 1)
    return jnp.take_along_axis(positions_BK, order_BK, 1), jnp.take_along_axis(weights_BK, order_BK, 1)


def bert_corrupt(key: jax.Array, tokens_BT: jax.Array, positions_BK: jax.Array, weights_BK: jax.Array | None = None, *,
                 mask_id: int, vocab_size: int, replace: float = 0.8, random: float = 0.1) -> jax.Array:
    """Tokens with the chosen positions masked (`replace`), random (`random`) or left as they are (the rest).

    A random token is uniform in [0, vocab_size). Positions of weight 0 are left as they are. int32 [B, T].
    Devlin et al. 2019.
    """
    batch, length = tokens_BT.shape
    hit_BKT = positions_BK[..., None] == jnp.arange(length)
    chosen_BT = (hit_BKT if weights_BK is None else hit_BKT & (weights_BK > 0)[..., None]).any(1)
    key_fate, key_token = jax.random.split(key)
    fate_BT = views.uniform(key_fate, (batch, length))
    random_BT = jax.random.randint(key_token, (batch, length), 0, vocab_size, tokens_BT.dtype,
                                   out_sharding=views.rows())
    corrupted_BT = jnp.where(fate_BT < replace, mask_id, jnp.where(fate_BT < replace + random, random_BT, tokens_BT))
    return jnp.where(chosen_BT, corrupted_BT, tokens_BT)


def span_lengths(raw_length: int, rate: float, mean_span: float) -> tuple[int, int, int, int]:
    """(n_noise, n_spans, n_inputs, n_targets) of `span_corrupt` on rows of `raw_length` tokens.

    Both outputs hold a sentinel per span and end in eos: n_inputs = raw_length - n_noise + n_spans + 1,
    n_targets = n_noise + n_spans + 1. Raises UserError for fewer than two tokens, which cannot be split.
    """
    if raw_length < 2:
        raise UserError(f"span corruption needs rows of at least 2 tokens, and these have {raw_length}")
    n_noise = min(max(round(raw_length * rate), 1), raw_length - 1)
    n_kept = raw_length - n_noise
    n_spans = min(max(round(n_noise / mean_span), 1), n_noise, n_kept)
    return n_noise, n_spans, n_kept + n_spans + 1, n_noise + n_spans + 1


def raw_length_for(n_inputs: int, rate: float, mean_span: float) -> int:
    """The largest raw length whose corrupted inputs fit in `n_inputs` tokens (Raffel et al. 2020).

    Raises UserError if none does: two tokens already make three inputs.
    """
    if n_inputs < 3:
        raise UserError(f"inputs of {n_inputs} tokens leave no room for span corruption; it takes at least 3")
    raw_length = 2
    while span_lengths(raw_length + 1, rate, mean_span)[2] <= n_inputs:
        raw_length += 1
    return raw_length


def span_corrupt(key: jax.Array, tokens_BT: jax.Array, *, rate: float = 0.15, mean_span: float = 3.0,
                 sentinel_id: int, eos_id: int) -> tuple[jax.Array, jax.Array]:
    """Span corruption: (inputs [B, n_inputs], targets [B, n_targets]) in the dtype of the tokens.

    A row alternates kept and noise spans, each of random non-empty length, kept first. Span i leaves its
    sentinel (`sentinel_id` + i) in the inputs; the targets hold each sentinel and the span behind it:

        a b C d E F  ->  a b <0> d <1> eos  and  <0> C <1> E F eos

    The lengths are those of `span_lengths`, the same in every row, so nothing is padded. Raffel et al. 2020.
    """
    batch, length = tokens_BT.shape
    n_noise, n_spans, n_inputs, n_targets = span_lengths(length, rate, mean_span)
    key_kept, key_noise = jax.random.split(key)
    kept_BS = random_segments(key_kept, batch, length - n_noise, n_spans)
    noise_BS = random_segments(key_noise, batch, n_noise, n_spans)
    noise_end_BS = jnp.cumsum(kept_BS + noise_BS, 1)
    noise_start_BS = noise_end_BS - noise_BS
    kept_start_BS = noise_start_BS - kept_BS
    sentinels = jnp.arange(n_spans) + sentinel_id

    def lay_out(start_BS, length_BS, n_slots, sentinel_first):
        """Spans one behind the other, each with a slot for its sentinel, then eos."""
        slots_BS = length_BS + 1
        end_BS = jnp.cumsum(slots_BS, 1)
        slot_N1 = jnp.arange(n_slots)[:, None]
        here_BNS = (slot_N1 < end_BS[:, None]) & (slot_N1 >= (end_BS - slots_BS)[:, None])

        def of_span(values):
            return jnp.where(here_BNS, values, 0).sum(-1)

        offset_BN = of_span(slot_N1 - (end_BS - slots_BS)[:, None])
        sentinel_at_BN = 0 if sentinel_first else of_span(length_BS[:, None])
        source_BN = of_span(start_BS[:, None]) + offset_BN - sentinel_first
        copied_BN = jnp.take_along_axis(tokens_BT, jnp.clip(source_BN, 0, length - 1), 1)
        spans_BN = jnp.where(offset_BN == sentinel_at_BN, of_span(sentinels), copied_BN)
        return jnp.where(slot_N1[:, 0] == n_slots - 1, eos_id, spans_BN).astype(tokens_BT.dtype)

    return (lay_out(kept_start_BS, kept_BS, n_inputs, sentinel_first=False),
            lay_out(noise_start_BS, noise_BS, n_targets, sentinel_first=True))


def random_segments(key: jax.Array, batch: int, n_items: int, n_segments: int) -> jax.Array:
    """Lengths int32 [B, n_segments] of non-empty segments of `n_items`, uniform over all such splits."""
    cuts_BS = jax.lax.top_k(views.uniform(key, (batch, n_items - 1)), n_segments - 1)[1] + 1
    ends_BS = jnp.pad(jnp.sort(cuts_BS, 1), ((0, 0), (1, 1)), constant_values=((0, 0), (0, n_items)))
    return jnp.diff(ends_BS, axis=1)


def random_keep(key: jax.Array, batch: int, n: int, n_keep: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which of `n` patches an encoder sees: (keep [B, n_keep], restore [B, n], mask [B, n]).

    keep:    int32, ids of the kept patches in random order.
    restore: int32, where patch i stands in the shuffled order: (kept, then masked)[restore] is the image.
    mask:    float32, 1 where a patch is hidden.

    He et al. 2022.
    """
    shuffle_Bn = jnp.argsort(views.uniform(key, (batch, n)), 1)
    restore_Bn = jnp.argsort(shuffle_Bn, 1)
    return shuffle_Bn[:, :n_keep], restore_Bn, (restore_Bn >= n_keep).astype(jnp.float32)


def look_up(table_V: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """table[tokens], with the rows of the tokens."""
    return table_V.at[tokens_BT].get(out_sharding=views.rows())
