"""Rows of noise in the shape of real ones: for compiling and measuring where the data is not."""

from typing import Literal

import numpy as np

from sslx.config import Count, Natural, UserError
from sslx.data import Example, Info, Source
from sslx.data.tokenize import N_SENTINELS, SPECIAL, special_ids


class Noise:
    """Example i is drawn from the generator that i seeds."""

    def __init__(self, n: int, field: str, shape: tuple[int, ...], below: int, dtype: type):
        self.n, self.field, self.shape, self.below, self.dtype = n, field, shape, below, dtype

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Example:
        return {self.field: np.random.default_rng(index).integers(0, self.below, self.shape, self.dtype)}


def make(*, modality: Literal["text", "image"], length: Natural = 0, vocab_size: Natural = 0,
         size: Natural = 0, channels: Natural = 3, n: Count = 1_000_000) -> Source:
    """`n` rows: of text, tokens int32 [length] below `vocab_size`, whose last ids are the special tokens; of images,
    uint8 [size, size, channels]."""
    if modality == "image":
        if size < 1 or channels < 1:
            raise UserError(f"synthetic images of {size} x {size} x {channels}: size and channels must be positive")
        shape = (size, size, channels)
        return Source(Noise(n, "image", shape, 256, np.uint8),
                      Info("synthetic", "image", f"synthetic {shape} {n}", shape=shape))
    first = vocab_size - len(SPECIAL)
    if length < 1 or first < 1:
        raise UserError(f"synthetic text of length={length} and vocab_size={vocab_size}: the one must be positive, the"
                        f" other more than the {len(SPECIAL)} special tokens")
    return Source(Noise(n, "tokens", (length,), first, np.int32),
                  Info("synthetic", "text", f"synthetic {length} {vocab_size} {n}", vocab_size=vocab_size,
                       special=special_ids(first), n_sentinels=N_SENTINELS, length=length))
