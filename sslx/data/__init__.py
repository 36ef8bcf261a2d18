"""Data sources: random access to raw examples. One file per kind of source, each with a `make`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

Example = dict[str, Any]


class BadRecord(Exception):
    """A record that cannot be read: which one, and why. Raised by `examples[i]`, never by `make`."""

    def __init__(self, record: str, reason: str):
        super().__init__(record, reason)
        self.record, self.reason = record, reason

    def __str__(self) -> str:
        return f"{self.record}: {self.reason}"


class RandomAccess(Protocol):
    """Examples by index: `source[i]` is a pure function of i, for 0 <= i < len(source).

    One that can read many at once also has `rows(indices_B) -> {field: array [B, ...]}`, equal to the
    stacked `source[i]` and never raising BadRecord; the pipeline then takes a whole batch in one call.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


class Info(NamedTuple):
    """What the networks and objectives must know of a source.

    name:            for logs.
    modality:        "text", "image" or "image_text".
    vocab_size:      token ids are in [0, vocab_size), special tokens included.
    special:         ids of special tokens by name: "eod", "mask", "pad", "sentinel" (the first of
                     `n_sentinels` consecutive ids).
    word_starts:     bool per token id: this token begins a word (whole-word masking); None if unknown.
    bytes_per_token: UTF-8 bytes of the text over its tokens, for bits per byte.
    length:          T of `tokens` [T].
    shape:           (H, W, C) of `image`.
    num_classes:     if examples carry `label`.
    fingerprint:     changes when the content does: a checkpoint refuses to resume on other data.
    classes:         their names, if they have some.
    decode:          token ids -> text.
    encode:          texts -> (tokens, segment_ids) int [N, T], as examples of "image_text" have them.
    """

    name: str
    modality: str
    fingerprint: str
    vocab_size: int = 0
    special: Mapping[str, int] = {}
    n_sentinels: int = 0
    word_starts: Sequence[bool] | None = None
    bytes_per_token: float | None = None
    length: int = 0
    shape: tuple[int, int, int] = (0, 0, 0)
    num_classes: int | None = None
    classes: Sequence[str] = ()
    decode: Any = None
    encode: Any = None


class Source(NamedTuple):
    """One pass over raw examples in their natural order, and what is known of them."""

    examples: RandomAccess
    info: Info
