"""Span corruption: an encoder reads text with spans cut out, a decoder writes the spans (Raffel et al. 2020).

B batch, S inputs, T targets.
"""

import jax.numpy as jnp

from sslx.config import Part, Positive, UserError
from sslx.data import Info
from sslx.models.encdec import EncoderDecoder
from sslx.objectives import Objective
from sslx.objectives.text import check_tokens, mean_pooled, special
from sslx.views.tokens import span_corrupt, span_lengths


def make(model: EncoderDecoder, info: Info, *, rate: Part = 0.15, mean_span: Positive = 3.0) -> Objective:
    """T5's objective: `rate` of the tokens in spans of `mean_span` tokens on average.

    Inputs and targets have the static lengths of `views.tokens.span_lengths`; nothing is padded.
    """
    check_tokens(model, info)
    sentinel, eod = special(info, "sentinel"), special(info, "eod")
    corruption = dict(rate=rate, mean_span=mean_span, sentinel_id=sentinel, eos_id=eod)
    n_spans = span_lengths(info.length, rate, mean_span)[1]
    if n_spans > info.n_sentinels:
        raise UserError(f"span corruption of {info.length} tokens makes {n_spans} spans, and the tokenizer has"
                        f" {info.n_sentinels} sentinels; shorten data.train.length or raise objective.mean_span")

    def init(key, batch):
        return model.init(key, *span_corrupt(key, batch["tokens"], **corruption))["params"], {}

    def loss(params, aux, batch, key):
        tokens_BT = batch["tokens"]
        inputs_BS, targets_BT = span_corrupt(key, tokens_BT, **corruption)
        value = model.apply({"params": params}, inputs_BS, targets_BT).mean()  # -log p(target), nats
        return value, (aux, {"loss": value, "tokens": jnp.int32(tokens_BT.size)})

    def encode(params, aux, batch):
        memory_BSD = model.apply({"params": params}, batch["tokens"], batch.get("segment_ids"), method="encode")
        return mean_pooled(memory_BSD, batch)

    return Objective(init, loss, encode)
