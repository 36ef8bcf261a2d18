"""Prepared token arrays: what `python -m sslx.data.prepare` wrote, memory-mapped, in fixed windows."""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from sslx.config import UserError
from sslx.data import Info, Source, tokenize
from sslx.data.fingerprint import fingerprint
from sslx.data.windows import Windows


class Shards(Sequence):
    """Memory-mapped arrays; they travel to other processes as paths."""

    def __init__(self, paths: Sequence[pathlib.Path], dtype: np.dtype):
        self.paths, self.dtype = paths, dtype

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):
        return self.mapped[index]

    @functools.cached_property
    def mapped(self) -> list[np.ndarray]:
        # A plain view of the map: slicing np.memmap itself costs four times as much.
        return [np.asarray(np.memmap(path, self.dtype, "r")) for path in self.paths]

    def __getstate__(self) -> dict:
        return {"paths": self.paths, "dtype": self.dtype}


def make(*, path: str, split: Literal["train", "heldout"] = "train", length: int, documents: bool = False) -> Source:
    """Windows of `length` tokens over the prepared folder `path`.

    Examples: tokens int32[T]; with `documents`, also segment_ids and positions int32[T], so that
    attention and loss can respect the ends of documents. Raises UserError for a missing, unfinished
    or truncated folder.
    """
    folder = pathlib.Path(path)
    manifest = read_manifest(folder)
    shards = manifest["splits"][split]
    dtype = np.dtype(manifest["dtype"])
    check_files(folder, shards, dtype)
    tokenizer = tokenize.load("bytes" if manifest["tokenizer"] == "bytes" else str(folder / manifest["tokenizer"]))
    if tokenizer.fingerprint != manifest["tokenizer_fingerprint"]:
        raise UserError(f"{folder / manifest['tokenizer']} is not the tokenizer that {folder} was prepared with:"
                        f" prepare it again. {command(folder)}")
    if length < 1:
        raise UserError(f"config.data.length is {length}; it takes a positive number of tokens")
    sizes = [s["tokens"] for s in shards]
    windows = Windows(Shards([folder / s["file"] for s in shards], dtype), sizes, length,
                      eod=tokenizer.special["eod"] if documents else None)
    if len(windows) == 0:
        raise UserError(f"{folder} holds {sum(sizes)} tokens in its split {split!r}, less than one window of"
                        f" config.data.length = {length}")
    info = Info(name=f"tokens:{folder.name}/{split}", modality="text", length=length,
                fingerprint=fingerprint(shards, manifest["tokenizer_fingerprint"], length, documents),
                bytes_per_token=sum(s["bytes"] for s in shards) / sum(sizes), **tokenizer.info())
    return Source(windows, info)


def read_manifest(folder: pathlib.Path) -> dict:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if {"dtype", "tokenizer", "tokenizer_fingerprint", "splits"} <= set(manifest):
            return manifest
        reason = "its manifest.json is not one of sslx"
    except FileNotFoundError:
        reason = "it has no manifest.json, which is written last" if folder.is_dir() else "there is no such folder"
    except (OSError, ValueError, TypeError) as error:
        reason = f"its manifest.json cannot be read ({error})"
    raise UserError(f"config.data.path is {str(folder)!r}, which holds no prepared tokens: {reason}. {command(folder)}")


def check_files(folder: pathlib.Path, shards: list[dict], dtype: np.dtype) -> None:
    for shard in shards:
        file, expected = folder / shard["file"], shard["tokens"] * dtype.itemsize
        found = file.stat().st_size if file.is_file() else None
        if found != expected:
            state = "is missing" if found is None else f"has {found} bytes"
            raise UserError(f"{file} {state}; the manifest says {expected} bytes. Delete {folder} and prepare it"
                            f" again. {command(folder)}")


def command(folder: pathlib.Path) -> str:
    return f"The command: python -m sslx.data.prepare --input stdlib --out {folder} (--input takes text or JSONL files)"
