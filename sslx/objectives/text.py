"""What the objectives on tokens share."""

import jax.numpy as jnp

from sslx.config import UserError
from sslx.data import Info


def check_tokens(model, info: Info) -> None:
    """Raises UserError unless the model's vocabulary and positions hold the data's tokens."""
    if model.vocab_size < info.vocab_size:
        raise UserError(f"model.vocab_size={model.vocab_size} is smaller than the {info.vocab_size} token ids of"
                        f" {info.name!r}; set model.vocab_size to {-(-info.vocab_size // 64) * 64} or more")
    longest = getattr(model, "max_length", info.length)
    if info.length > longest:
        raise UserError(f"data.train.length={info.length} is longer than model.max_length={longest} positions;"
                        " shorten the one or raise the other")


def special(info: Info, name: str) -> int:
    """The id of a special token. Raises UserError if the tokenizer has none of this name."""
    if name not in info.special:
        has = ", ".join(info.special) or "none"
        raise UserError(f"the tokenizer of {info.name!r} has no {name!r} token; it has {has}")
    return info.special[name]


def masking(batch) -> dict:
    """The arguments by which a transformer respects the documents of a batch."""
    return {name: batch[name] for name in ("segment_ids", "positions") if name in batch}


def mean_pooled(hidden_BTD, batch):
    """Features float32 [B, D]: the mean of the hidden states of all tokens but padding (segment 0)."""
    text_BT = jnp.minimum(batch["segment_ids"], 1) if "segment_ids" in batch else jnp.ones_like(batch["tokens"])
    summed_BD = (hidden_BTD.astype(jnp.float32) * text_BT[..., None]).sum(1)
    return summed_BD / jnp.maximum(text_BT.sum(1), 1)[:, None]
