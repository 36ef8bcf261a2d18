"""The order in which examples are seen: a permutation for each pass, any place of which is known without the others.

A pass of n examples is a Feistel network on the numbers of as many bits as n - 1 has (Luby & Rackoff 1988), keyed by
the seed and the pass; a number of n or more is enciphered again until it is less (cycle walking, Black & Rogaway
2002). Nothing is held in memory and nothing is drawn in turn, so a run resumes at any step. Computed for many places
at once: one call a row would cost more than to read a row of tokens.
"""

import functools
from typing import NamedTuple

import numpy as np

BLOCK = 8192  # places that are computed together
ROUNDS = 6
FEWEST_BITS = 7  # with fewer some orders of five examples come twice as often as others, even after eight rounds
RECENT = 64  # blocks that are kept: rows are read in order, some steps ahead, of several sources


class Order(NamedTuple):
    """Places of `n` examples, in an endless order; pass p is its places p n, ..., (p + 1) n - 1."""

    n: int
    seed: int
    shuffle: bool = True

    def __call__(self, indices_B: np.ndarray) -> np.ndarray:
        """The examples int64[B] at the places `indices_B` of the order."""
        if not self.shuffle:
            return indices_B % self.n
        block_B, place_B = np.divmod(indices_B, BLOCK)
        found_B = np.empty(len(indices_B), np.int64)
        for block in set(block_B.tolist()):
            here_B = block_B == block
            found_B[here_B] = shuffled(self.n, self.seed, block)[place_B[here_B]]
        return found_B


@functools.lru_cache(RECENT)
def shuffled(n: int, seed: int, block: int) -> np.ndarray:
    """The examples at places block * BLOCK, ..., int64[BLOCK]."""
    indices = np.arange(block * BLOCK, (block + 1) * BLOCK, dtype=np.uint64)
    passes, x = np.divmod(indices, np.uint64(n))
    keys = mixed(passes ^ mixed(np.array([seed], np.uint64)))
    bits = max(FEWEST_BITS, (n - 1).bit_length())
    x, walking = enciphered(x, keys, bits), np.arange(BLOCK)
    while len(walking := walking[x[walking] >= n]):
        x[walking] = enciphered(x[walking], keys[walking], bits)
    return x.astype(np.int64)


def enciphered(x: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """A permutation of the numbers of `bits` bits for every key."""
    low_bits, high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    low, high = x & ((np.uint64(1) << low_bits) - np.uint64(1)), x >> low_bits
    for i in range(0, ROUNDS, 2):
        low = low ^ mixed(high + keys + np.uint64(i << 32)) >> (np.uint64(64) - low_bits)
        high = high ^ mixed(low + keys + np.uint64(i + 1 << 32)) >> (np.uint64(64) - high_bits)
    return high << low_bits | low


def mixed(x: np.ndarray) -> np.ndarray:
    """The numbers of SplitMix64 from the states `x` (Steele et al. 2014): every bit depends on all, uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
