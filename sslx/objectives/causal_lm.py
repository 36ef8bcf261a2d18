"""Causal language modelling: predict each token from those before it (Radford et al. 2018).

B batch, T time, D model, V vocabulary.
"""

import jax
import jax.numpy as jnp

from sslx.config import Count, Positive
from sslx.data import Info
from sslx.models.transformer import Transformer
from sslx.objectives import Objective
from sslx.objectives.text import check_tokens, masking, mean_pooled
from sslx.sharding import whole


def following(x_BT):
    """x of the next token at each, 0 at the last."""
    return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))


def next_token_loss(nll_BT, segment_ids=None):
    """Mean of nll_t = -log p(token t + 1 | tokens <= t), nats, over t < T - 1.

    No prediction crosses a document boundary: both tokens have the same of `segment_ids` int [B, T].
    """
    B, T = nll_BT.shape
    inside = (jnp.arange(T) < T - 1)[None]
    if segment_ids is not None:
        inside = inside & (following(segment_ids) == segment_ids)
    n = inside.sum() * (B // len(inside))
    return jnp.where(inside, nll_BT, 0).sum() / jnp.maximum(n, 1)


def make(model: Transformer, info: Info, *, sample_length: Count = 128, temperature: Positive = 0.8) -> Objective:
    """Causal LM on windows of tokens; `sample_length` tokens are generated for the report at `temperature`."""
    check_tokens(model, info)

    def init(key, batch):
        return model.init(key, batch["tokens"], "causal")["params"], {}

    def loss(params, aux, batch, key):
        tokens_BT = batch["tokens"]
        hidden_BTD = model.apply({"params": params}, tokens_BT, "causal", **masking(batch), method="hidden")
        nll_BT = model.apply({"params": params}, hidden_BTD, following(tokens_BT), method="nll")
        value = next_token_loss(nll_BT, batch.get("segment_ids"))
        return value, (aux, {"loss": value, "token_nll": value, "tokens": jnp.int32(tokens_BT.size)})

    def encode(params, aux, batch):
        hidden_BTD = model.apply({"params": params}, batch["tokens"], "causal", **masking(batch), method="hidden")
        return mean_pooled(hidden_BTD, batch)

    def show(params, aux, batch, key):
        tokens_BT = batch["tokens"]
        length = min(sample_length, info.length)
        n_prompt = length // 4

        def extend(t, tokens_BT):
            hidden_BTD = whole(model.apply({"params": params}, tokens_BT, "causal", method="hidden"))
            hidden_B1D = jax.lax.dynamic_slice_in_dim(hidden_BTD, t - 1, 1, 1)
            logits_BV = model.apply({"params": params}, hidden_B1D, method="logits")[:, 0].astype(jnp.float32)
            chosen_B = draw(jax.random.fold_in(key, t), logits_BV / temperature)
            return jnp.where(jnp.arange(length) == t, chosen_B[:, None], tokens_BT)

        return {"sample": jax.lax.fori_loop(n_prompt, length, extend, tokens_BT[:, :length])}

    return Objective(init, loss, encode, show)


def draw(key, logits_BV):
    """A token per row from softmax(logits), int32 [B]: the arg max of logits plus Gumbel noise."""
    return jnp.argmax(logits_BV + jax.random.gumbel(key, logits_BV.shape), -1).astype(jnp.int32)
