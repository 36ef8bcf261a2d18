"""Several sources as one, in fixed proportions."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from sslx.config import UserError
from sslx.data import Example, Info, Source, pipeline
from sslx.data.fingerprint import fingerprint
from sslx.data.pipeline import OnBad

AGREE = ("modality", "vocab_size", "special", "word_starts", "length", "shape")
MAX_DENOMINATOR = 10_000


class Mixture:
    """Example i is drawn from one of the sources, evenly spread: of any n in a row, about w * n come from each."""

    def __init__(self, parts: Sequence[Any], weights: Sequence[int], without: Sequence[str]):
        self.parts, self.weights, self.without = parts, weights, without

    def __len__(self) -> int:
        """One pass shows every example of every source at least once; the smaller ones repeat."""
        return max(math.ceil(Fraction(len(p) * sum(self.weights), w))
                   for p, w in zip(self.parts, self.weights, strict=True))

    def __getitem__(self, index: int) -> Example:
        part_B, place_B = locate(np.array([index]), self.weights)
        part = self.parts[part_B[0]]
        return self.fields(part[int(place_B[0]) % len(part)])

    def fields(self, example: Example) -> Example:
        return {name: x for name, x in example.items() if name not in self.without}


class MixtureOfRows(Mixture):
    """A mixture of sources that can all read many examples at once."""

    def rows(self, indices_B: np.ndarray) -> Example:
        part_B, place_B = locate(indices_B, self.weights)
        mixed: Example = {}
        for k, part in enumerate(self.parts):
            chosen = np.flatnonzero(part_B == k)
            if not len(chosen):
                continue
            for name, x in self.fields(part.rows(place_B[chosen] % len(part))).items():
                mixed.setdefault(name, np.empty((len(indices_B), *x.shape[1:]), x.dtype))[chosen] = x
        return mixed


def make(*, sources: dict, weights: dict | tuple[float, ...], on_bad: OnBad = "skip") -> Source:
    """A mixture of the sections `sources` {name: section} with `weights`, by name or in order.

    Example i is a pure function of i. One pass is as long as it takes to see every source whole.
    Raises UserError if the sources differ in what a network sees (modality, tokenizer, length, shape).
    """
    names = list(sources)
    built = {n: pipeline.source(sources[n], f"config.data.sources.{n}", on_bad) for n in names}
    whole = integers(by_name(weights, names))
    infos = [built[n].info for n in names]
    for field in AGREE:
        values = [getattr(info, field) for info in infos]
        if any(v != values[0] for v in values):
            which = "the tokenizer" if field == "word_starts" else field
            found = ", ".join(f"{n} has {str(v)[:60]}" for n, v in zip(names, values, strict=True))
            raise UserError(f"config.data.sources differ in {which}: {found}."
                            " A mixture takes sources that one network can read")
    same_labels = len({info.num_classes for info in infos}) == 1
    parts: list[Any] = [built[n].examples for n in names]
    kind = MixtureOfRows if all(hasattr(p, "rows") for p in parts) else Mixture
    if kind is MixtureOfRows:
        fields = [sorted(set(part.rows(np.array([0]))) - {"label"}) for part in parts]
        if any(f != fields[0] for f in fields):
            found = ", ".join(f"{n} has {' and '.join(f)}" for n, f in zip(names, fields, strict=True))
            raise UserError(f"config.data.sources differ in the fields of their examples: {found}. Set `documents`"
                            " alike in all")
    share = np.array(whole) / sum(whole)
    info = infos[0]._replace(
        name=f"mixture:{'+'.join(i.name for i in infos)}",
        num_classes=infos[0].num_classes if same_labels else None,
        bytes_per_token=mean_bytes_per_token(infos, share),
        fingerprint=fingerprint([(i.fingerprint, w) for i, w in zip(infos, whole, strict=True)]))
    return Source(kind(parts, whole, () if same_labels else ("label",)), info)


def locate(indices_B: np.ndarray, weights: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which source example i is drawn from, and at which place of it.

    Source k takes the i at which floor(i (W - w_k) / W) does not grow; the next sources share the rest
    in the same way, with W - w_k for W.
    """
    part_B, place_B = np.full(len(indices_B), -1), np.zeros(len(indices_B), np.int64)
    i_B, remaining = np.asarray(indices_B, np.int64), sum(weights)
    for k, weight in enumerate(weights):
        rest_B = i_B * (remaining - weight) // remaining
        takes_B = (part_B < 0) & ((i_B + 1) * (remaining - weight) // remaining == rest_B)
        part_B[takes_B], place_B[takes_B] = k, (i_B - rest_B)[takes_B]
        i_B, remaining = rest_B, remaining - weight
        if remaining == 0:
            break
    return part_B, place_B


def by_name(weights: Any, names: list[str]) -> list[float]:
    if hasattr(weights, "items"):
        if set(weights) != set(names):
            raise UserError(f"config.data.weights are for {', '.join(weights)}; config.data.sources are"
                            f" {', '.join(names)}")
        return [weights[n] for n in names]
    if len(weights) != len(names):
        raise UserError(f"config.data.weights are {len(weights)} for {len(names)} config.data.sources")
    return list(weights)


def integers(weights: list[float]) -> list[int]:
    """The weights as whole numbers of equal proportions, to about 4 digits."""
    if not weights or not all(isinstance(w, int | float) and 0 < w < math.inf for w in weights):
        raise UserError(f"config.data.weights are {weights}; they take positive numbers (leave out a source for 0)")
    total = sum(Fraction(w) for w in weights)
    shares = [max(Fraction(w) / total, Fraction(1, MAX_DENOMINATOR)) for w in weights]
    whole = [round(s * MAX_DENOMINATOR) for s in shares]
    divisor = math.gcd(*whole)
    return [w // divisor for w in whole]


def mean_bytes_per_token(infos: Sequence[Info], share: np.ndarray) -> float | None:
    if any(i.bytes_per_token is None for i in infos):
        return None
    return float(sum(s * i.bytes_per_token for s, i in zip(share, infos, strict=True) if i.bytes_per_token))
