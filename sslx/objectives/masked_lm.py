"""Masked language modelling: predict hidden tokens from both sides (Devlin et al. 2019).

B batch, T time, K masked positions, D model.
"""

import jax
import jax.numpy as jnp

from sslx.config import Part, Share, UserError
from sslx.data import Info
from sslx.models.transformer import Transformer
from sslx.objectives import Objective
from sslx.objectives.text import check_tokens, masking, mean_pooled, special
from sslx.sharding import whole
from sslx.views.tokens import bert_corrupt, mask_positions


def masked_token_loss(nll_BK, weights_BK):
    """Mean of nll = -log p(token) over the masked positions, nats."""
    return (nll_BK * weights_BK).sum() / jnp.maximum(weights_BK.sum(), 1)


def make(model: Transformer, info: Info, *, rate: Part = 0.15, replace: Share = 0.8, random: Share = 0.1,
         whole_word: bool = False) -> Objective:
    """BERT's objective, with positions redrawn at every step and the head on masked positions only.

    rate:       of tokens to predict.
    replace:    of these replaced by the mask token; `random` by a random one; the rest stay.
    whole_word: mask words rather than tokens.
    """
    check_tokens(model, info)
    if replace + random > 1:
        raise UserError(f"objective.replace={replace} and objective.random={random} are shares of the same tokens, and"
                        " sum to more than 1")
    mask_id, pad_id = special(info, "mask"), info.special.get("pad")
    if whole_word and info.word_starts is None:
        raise UserError("objective.whole_word needs to know where words begin, and the tokenizer of"
                        f" {info.name!r} does not")
    # Only what is text can stand in for a token: special ids come last.
    n_ordinary = min(info.special.values(), default=info.vocab_size)

    def init(key, batch):
        return model.init(key, batch["tokens"], "bidirectional")["params"], {}

    def loss(params, aux, batch, key):
        tokens_BT = batch["tokens"]
        key_positions, key_corrupt = jax.random.split(key)
        text_BT = None if pad_id is None else tokens_BT != pad_id
        positions_BK, weights_BK = mask_positions(key_positions, tokens_BT, rate=rate, valid=text_BT,
                                                  word_starts=info.word_starts if whole_word else None)
        seen_BT = bert_corrupt(key_corrupt, tokens_BT, positions_BK, weights_BK, mask_id=mask_id,
                               vocab_size=n_ordinary, replace=replace, random=random)
        hidden_BTD = model.apply({"params": params}, seen_BT, "bidirectional", **masking(batch), method="hidden")
        masked_BKD = jnp.take_along_axis(whole(hidden_BTD), positions_BK[..., None], 1)
        masked_BK = jnp.take_along_axis(tokens_BT, positions_BK, 1)
        value = masked_token_loss(model.apply({"params": params}, masked_BKD, masked_BK, method="nll"), weights_BK)
        n_tokens = jnp.int32(tokens_BT.size) if text_BT is None else text_BT.sum(dtype=jnp.int32)
        return value, (aux, {"loss": value, "tokens": n_tokens})

    def encode(params, aux, batch):
        hidden_BTD = model.apply({"params": params}, batch["tokens"], "bidirectional", **masking(batch),
                                 method="hidden")
        return mean_pooled(hidden_BTD, batch)

    return Objective(init, loss, encode)
