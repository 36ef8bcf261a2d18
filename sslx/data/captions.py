"""Images with captions: a folder with captions.jsonl, which names its images."""

import json
import pathlib
from typing import Any, Literal

import numpy as np

from sslx.config import Count, UserError
from sslx.data import Example, Info, Source, corpus, pixels, tokenize
from sslx.data.fingerprint import fingerprint


class Captioned:
    """Example i is an image, decoded when it is read, and its tokens; one that cannot be decoded is a BadRecord."""

    def __init__(self, root: pathlib.Path, images: list[str], size: int, fields: dict[str, np.ndarray]):
        self.root, self.images, self.size, self.fields = root, images, size, fields

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        image = pixels.read(self.root / self.images[index], self.size)
        return {"image": image} | {name: x[index] for name, x in self.fields.items()}


def make(*, path: str, size: Count, length: Count, split: Literal["train", "heldout", "all"] = "all",
         heldout: float = 0.1, tokenizer: str = "bytes") -> Source:
    """Pairs: image uint8[size, size, 3], tokens and segment_ids int32[length] (0 where there is padding), label int32.

    A line of `path`/captions.jsonl is {"image": a file of the folder, "caption": text}, with "class" if all have one,
    and "key", by whose hash a pair is held out: those of one key stay together; the image's name if there is none.
    Raises UserError for a file that is missing or holds something else.
    """
    root, listing = pathlib.Path(path), pathlib.Path(path, "captions.jsonl")
    try:
        records = [read(line, listing, i) for i, line in enumerate(listing.read_text().splitlines(), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config.data.path={path!r}: {listing} cannot be read ({error}). It takes a folder of images"
                        ' with a line {"image": ..., "caption": ...} for each in captions.jsonl') from error
    classes = sorted({r["class"] for r in records if r["class"] is not None})
    records = [r for r in records if corpus.in_split(r["key"], split, heldout)]
    if not records:
        raise UserError(f"{listing} has no pair in its split {split!r}")
    encoder = tokenize.load(tokenizer)
    tokens_NT, segments_NT = padded([r["caption"] for r in records], encoder, length)
    fields = {"tokens": tokens_NT, "segment_ids": segments_NT}
    labelled = all(r["class"] is not None for r in records)
    if labelled:
        fields["label"] = np.array([classes.index(r["class"]) for r in records], np.int32)
    info = Info(name=f"captions:{root.name}/{split}", modality="image_text", shape=(size, size, 3), length=length,
                num_classes=len(classes) if labelled else None, classes=tuple(classes) if labelled else (),
                encode=lambda texts: padded(texts, encoder, length), **encoder.info(),
                fingerprint=fingerprint([tuple(r.values()) for r in records], size, length, encoder.fingerprint))
    return Source(Captioned(root, [r["image"] for r in records], size, fields), info)


def read(line: str, listing: pathlib.Path, number: int) -> dict[str, Any]:
    """A line's {"image", "caption", "key", "class"}. Raises UserError for one that is not like that."""
    try:
        record = json.loads(line)
        found = {"image": record["image"], "caption": record["caption"], "key": record.get("key", record["image"]),
                 "class": record.get("class")}
        if not all(isinstance(x, str) for name, x in found.items() if name != "class" or x is not None):
            raise TypeError("a value is no string")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f'{listing}, line {number}, is no {{"image": file, "caption": text}}'
                        f" ({type(error).__name__}: {error})") from error
    if pathlib.PurePosixPath(found["image"]).is_absolute() or ".." in pathlib.PurePosixPath(found["image"]).parts:
        raise UserError(f"{listing}, line {number}: {found['image']!r} is outside the folder")
    return found


def padded(texts: list[str], encoder: tokenize.Tokenizer, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segment_ids) int32 [N, length]: the first tokens of each text, eod, and padding, which is segment 0."""
    tokens_NT = np.full((len(texts), length), encoder.special["pad"], np.int32)
    segments_NT = np.zeros((len(texts), length), np.int32)
    for text, tokens_T, segments_T in zip(texts, tokens_NT, segments_NT, strict=True):
        ids = [*encoder.encode(text)[: length - 1], encoder.special["eod"]]
        tokens_T[: len(ids)], segments_T[: len(ids)] = ids, 1
    return tokens_NT, segments_NT
