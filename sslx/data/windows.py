"""Fixed windows over a long token array: packing that is random access by construction."""

import bisect
from collections.abc import Sequence

import numpy as np

from sslx.data import Example


class Windows:
    """Example i is tokens i * T .. (i + 1) * T of the concatenation of `shards`; the remainder is dropped.

    With `eod` given, each window also has `segment_ids` and `positions` (see `documents`); with
    `labels` (one a window), `label`.
    """

    def __init__(self, shards: Sequence[np.ndarray], sizes: Sequence[int], length: int, eod: int | None = None,
                 labels: np.ndarray | None = None):
        self.shards, self.length, self.eod, self.labels = shards, length, eod, labels
        self.starts = np.cumsum([0, *sizes]).tolist()

    def __len__(self) -> int:
        return self.starts[-1] // self.length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {name: x[0] for name, x in self.rows(np.array([index])).items()}

    def rows(self, indices_B: np.ndarray) -> Example:
        tokens_BT = self.gather(indices_B).astype(np.int32, copy=False)
        fields: Example = {"tokens": tokens_BT}
        if self.eod is not None:
            fields["segment_ids"], fields["positions"] = documents(tokens_BT, self.eod)
        if self.labels is not None:
            fields["label"] = self.labels[indices_B]
        return fields

    def gather(self, indices_B: np.ndarray) -> np.ndarray:
        """The tokens [B, T] of the windows, in the width in which they are stored."""
        if len(self.shards) == 1:
            return self.shards[0][:len(self) * self.length].reshape(len(self), self.length)[indices_B]
        tokens_BT = np.empty((len(indices_B), self.length), self.shards[0].dtype)
        for row_T, index in zip(tokens_BT, indices_B.tolist(), strict=True):
            self.fill(row_T, index * self.length)
        return tokens_BT

    def fill(self, row_T: np.ndarray, offset: int) -> None:
        """Copies the tokens from `offset` on into `row_T`, across the ends of shards."""
        shard, filled = bisect.bisect_right(self.starts, offset) - 1, 0
        while filled < len(row_T):
            begin = offset + filled - self.starts[shard]
            piece = self.shards[shard][begin : begin + len(row_T) - filled]
            row_T[filled : filled + len(piece)] = piece
            filled, shard = filled + len(piece), shard + 1


def documents(tokens_BT: np.ndarray, eod: int, pad: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Which document of its window a token is of, and its place in it; an eod ends its document.

    Returns segment_ids int32[B, T] (1, 2, ...; 0 for padding) and positions int32[B, T] (from 0 at
    the start of the window or of the document).
    """
    ends_BT = tokens_BT == eod
    begins_BT = np.zeros_like(ends_BT)
    begins_BT[:, 1:] = ends_BT[:, :-1]
    place_T = np.arange(tokens_BT.shape[1], dtype=np.int32)
    segment_ids_BT = 1 + np.cumsum(begins_BT, axis=1, dtype=np.int32)
    positions_BT = place_T - np.maximum.accumulate(np.where(begins_BT, place_T, 0), axis=1)
    if pad is not None:
        segment_ids_BT = np.where(tokens_BT == pad, 0, segment_ids_BT)
    return segment_ids_BT, positions_BT.astype(np.int32)
