"""Prepared token arrays: what `python -m sslx.data.prepare` wrote, memory-mapped, in fixed windows."""

import functools
import hashlib
import pathlib
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from sslx import config
from sslx.config import Count, UserError
from sslx.data import Info, Source, header, tokenize
from sslx.data.fingerprint import fingerprint
from sslx.data.header import Size
from sslx.data.windows import Windows

SHARD_NAME = re.compile(r"(train|heldout)-\d{5,}\.bin")


class Shard(NamedTuple):
    """One file of a split: tokens, the documents that end in it, their bytes of text, and its checksum."""

    file: str
    tokens: Count
    documents: Size
    bytes: Size
    sha256: str


class Manifest(NamedTuple):
    """manifest.json: what the folder holds. splits: {"train": shards, "heldout": shards}."""

    format: Literal["sslx tokens"]
    version: Literal[1]
    dtype: Literal["<u2", "<u4"]
    tokenizer: Literal["bytes", "tokenizer.json"]
    tokenizer_fingerprint: str
    train_documents: Size
    train_tokens: Size
    train_bytes: Size
    heldout_documents: Size
    heldout_tokens: Size
    heldout_bytes: Size
    bytes_per_token: float
    skipped_empty: Size
    skipped_bad: Size
    splits: dict


class Shards(Sequence):
    """Memory-mapped arrays; they travel to other processes as paths."""

    def __init__(self, paths: Sequence[pathlib.Path], sizes: Sequence[int], dtype: str):
        self.paths, self.sizes, self.dtype = paths, sizes, dtype

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):
        return self.mapped[index]

    @functools.cached_property
    def mapped(self) -> list[np.ndarray]:
        # A plain view of the map: slicing np.memmap itself costs four times as much.
        return [self.map(path, size) for path, size in zip(self.paths, self.sizes, strict=True)]

    def map(self, path: pathlib.Path, size: int) -> np.ndarray:
        try:
            return np.asarray(np.memmap(path, self.dtype, "r", shape=(size,)))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): it has changed since the run began."
                            f" {remedy(path.parent)}") from error

    def __getstate__(self) -> dict:
        return {"paths": self.paths, "sizes": self.sizes, "dtype": self.dtype}


class Prepared(Windows):
    """Windows of prepared tokens. Raises UserError where one is not of the vocabulary: the shard is damaged."""

    def __init__(self, folder: pathlib.Path, shards: list[Shard], dtype: str, length: int, vocab_size: int,
                 eod: int | None):
        sizes = [s.tokens for s in shards]
        super().__init__(Shards([folder / s.file for s in shards], sizes, dtype), sizes, length, eod)
        self.folder, self.vocab_size = folder, vocab_size

    def gather(self, indices_B: np.ndarray) -> np.ndarray:
        tokens_BT = super().gather(indices_B)
        if tokens_BT.size and tokens_BT.max() >= self.vocab_size:
            foreign = np.flatnonzero((tokens_BT >= self.vocab_size).any(axis=1))[0]
            raise UserError(f"window {indices_B[foreign]} of {self.folder} holds tokens beyond its vocabulary of"
                            f" {self.vocab_size}: a shard is damaged. Which one, says"
                            f" python -m sslx.data.prepare --verify {self.folder}")
        return tokens_BT


def make(*, path: str, split: Literal["train", "heldout"] = "train", length: Count, documents: bool = False) -> Source:
    """Windows of `length` tokens over the prepared folder `path`.

    Examples: tokens int32[T]; with `documents`, also segment_ids and positions int32[T], so that
    attention and loss can respect the ends of documents. Raises UserError for a missing, unfinished
    or truncated folder. What has changed within the files only `damage` finds.
    """
    folder = pathlib.Path(path)
    manifest, splits = read_manifest(folder)
    shards = splits[split]
    for shard in shards:
        if wrong := wrong_size(folder, shard, manifest.dtype):
            raise UserError(f"{wrong}. {remedy(folder)}")
    tokenizer = read_tokenizer(folder, manifest)
    windows = Prepared(folder, shards, manifest.dtype, length, tokenizer.vocab_size,
                       tokenizer.special["eod"] if documents else None)
    n_tokens, n_bytes = sum(s.tokens for s in shards), sum(s.bytes for s in shards)
    if len(windows) == 0:
        raise UserError(f"{folder} holds {n_tokens} tokens in its split {split!r}, less than one window of"
                        f" config.data.length = {length}")
    info = Info(name=f"tokens:{folder.name}/{split}", modality="text", length=length,
                fingerprint=fingerprint([s._asdict() for s in shards], manifest.tokenizer_fingerprint, length,
                                        documents),
                bytes_per_token=n_bytes / n_tokens, **tokenizer.info())
    return Source(windows, info)


def read_manifest(folder: pathlib.Path) -> tuple[Manifest, dict[str, list[Shard]]]:
    """The manifest and the shards of each split. Raises UserError for one that `prepare` cannot have written."""
    file = folder / "manifest.json"
    try:
        if not folder.is_dir():
            raise UserError("there is no such folder")
        if not file.is_file():
            raise UserError("it has no manifest.json, which is written last")
        manifest = header.load(Manifest, file)
        lists = {split for split, shards in manifest.splits.items() if isinstance(shards, list)}
        if not lists == set(manifest.splits) == {"train", "heldout"}:
            raise UserError(f"{file}.splits takes a list of shards for each of train and heldout")
        splits = {split: [config.call(Shard, shard, f"{file}.splits.{split}[{k}]") for k, shard in enumerate(shards)]
                  for split, shards in manifest.splits.items()}
        for split, shards in splits.items():
            for shard in shards:
                if not SHARD_NAME.fullmatch(shard.file):
                    raise UserError(f"{file} names {shard.file!r}, which is no shard's name")
            for what in ("documents", "tokens", "bytes"):
                total, parts = getattr(manifest, f"{split}_{what}"), sum(getattr(s, what) for s in shards)
                if total != parts:
                    raise UserError(f"{file}.{split}_{what} is {total}, and its shards have {parts}")
    except UserError as error:
        raise UserError(f"config.data.path is {str(folder)!r}, which holds no prepared tokens: {error}."
                        f" {remedy(folder)}") from error
    return manifest, splits


def read_tokenizer(folder: pathlib.Path, manifest: Manifest) -> tokenize.Tokenizer:
    """The tokenizer that the folder was prepared with. Raises UserError if it is another."""
    tokenizer = tokenize.load("bytes" if manifest.tokenizer == "bytes" else str(folder / manifest.tokenizer))
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(f"{folder / manifest.tokenizer} is not the tokenizer that {folder} was prepared with."
                        f" {remedy(folder)}")
    return tokenizer


def wrong_size(folder: pathlib.Path, shard: Shard, dtype: str) -> str | None:
    file, expected = folder / shard.file, shard.tokens * np.dtype(dtype).itemsize
    found = file.stat().st_size if file.is_file() else None
    if found == expected:
        return None
    return f"{file} {'is missing' if found is None else f'has {found} bytes'}; the manifest says {expected} bytes"


def damage(folder: pathlib.Path) -> list[str]:
    """What is wrong with each damaged shard: every byte is read. Raises UserError for a manifest or a tokenizer."""
    manifest, splits = read_manifest(folder)
    read_tokenizer(folder, manifest)
    return [wrong for shards in splits.values() for shard in shards
            if (wrong := wrong_size(folder, shard, manifest.dtype) or wrong_bytes(folder / shard.file, shard.sha256))]


def wrong_bytes(file: pathlib.Path, sha256: str) -> str | None:
    with file.open("rb") as f:
        return None if hashlib.file_digest(f, "sha256").hexdigest() == sha256 else f"{file} holds other bytes"


def remedy(folder: pathlib.Path) -> str:
    return (f"Delete {folder} and prepare it again: python -m sslx.data.prepare --input stdlib --out {folder}"
            " (--input takes text or JSONL files)")
