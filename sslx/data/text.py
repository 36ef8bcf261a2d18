"""Small corpora of text, tokenized once into memory: files, folders, patterns, JSONL, Python's own library."""

import collections
import logging
from collections.abc import Iterable
from typing import Literal

import numpy as np

from sslx.config import UserError, redacted
from sslx.data import Info, Source, corpus, tokenize
from sslx.data.arrays import Arrays
from sslx.data.corpus import Document
from sslx.data.fingerprint import fingerprint
from sslx.data.pipeline import OnBad
from sslx.data.tokenize import Tokenizer
from sslx.data.windows import Windows
from sslx.data.windows import documents as documents_of

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 32  # all of it is in memory at once, as text and as tokens

# Packages of Python's library that make a class: large enough to be held out by file.
MAX_PACKAGES, MIN_FILES, LARGEST_TO_MEDIAN = 16, 20, 2


def make(
    *,
    path: str = corpus.STDLIB,
    split: Literal["train", "heldout", "all"] = "train",
    length: int,
    tokenizer: str = "bytes",
    documents: bool = False,
    heldout: float = 0.05,
    limit: int | None = None,
    labels: Literal["none", "package", "field"] = "none",
    text_field: str = "text",
    label_field: str = "label",
    on_bad: OnBad = "skip",
) -> Source:
    """Windows of `length` tokens over the documents of `path`, each document ended by eod.

    A document is held out by a hash of its relative path (of its text, in JSONL). `limit` keeps the
    first windows only. Examples: tokens int32[T]; with `documents`, segment_ids and positions int32[T].

    labels="package": `label` is the top-level package of a window's file (path="stdlib"; its largest
    packages without "test", at most twice as many windows of one as of the median one).
    labels="field": an example is one JSONL document with its label, cut to T or padded with pad
    (segment_ids 0 there, which come with these examples always).

    Empty documents are counted and skipped, and so are files that are no UTF-8 text and unreadable lines, unless
    on_bad="stop", which raises UserError.
    """
    if length < 1:
        raise UserError(f"config.data.length is {length}; it takes a positive number of tokens")
    if not 0 <= heldout < 1:
        raise UserError(f"config.data.heldout is {heldout}; it takes a fraction of documents, from 0 to below 1")
    if labels == "package" and path != corpus.STDLIB:
        raise UserError(f"config.data.labels is 'package' and config.data.path {path!r}: only {corpus.STDLIB!r} has"
                        " packages; JSONL takes labels='field'")
    if limit is not None and limit < 1:
        raise UserError(f"config.data.limit is {limit}; it takes a positive number of windows, or None")
    encoder = tokenize.load(tokenizer)
    files = corpus.files(path, "config.data.path")
    if labels == "package":
        packages = largest_packages(files)
        files = [f for f in files if package(f.key) in packages]
    if labels == "field" and not all(corpus.is_jsonl(f.path) for f in files):
        raise UserError(f"config.data.labels is 'field' and config.data.path {path!r}: labels of documents are read"
                        " from JSONL files (*.jsonl) only")
    n_stored = sum(f.path.stat().st_size for f in files)
    if n_stored > MAX_BYTES:
        raise UserError(f"config.data.path {path!r} holds {n_stored} bytes; more than {MAX_BYTES} are not read into"
                        f" memory. Prepare it (python -m sslx.data.prepare --input {path!r} --out FOLDER) and read it"
                        " with config.data.name='tokens'")
    label = label_field if labels == "field" else None
    found = (d for f in files for d in corpus.documents(f, text_field, label))
    kept = readable(found, path, split, heldout, on_bad)
    encoded = [with_eod(d, encoder) for d in kept]
    n_tokens, n_bytes = sum(map(len, encoded)), sum(len(d.text) for d in kept)

    eod, pad = encoder.special["eod"], encoder.special["pad"]
    classes: list = []
    examples: Windows | Arrays
    if labels == "none":
        tokens_N = np.concatenate(encoded)[: limit and limit * length]
        examples = Windows([tokens_N], [len(tokens_N)], length, eod if documents else None)
    else:
        of_document = [package(d.key) if labels == "package" else d.label for d in kept]
        classes = sorted(set(of_document), key=lambda c: (str(type(c)), c)) if labels == "field" else packages
        targets = [classes.index(c) for c in of_document]
        if labels == "field" and 4 * length * len(kept) > MAX_BYTES:
            raise UserError(f"config.data.length is {length}: {len(kept)} documents padded to it need more than"
                            f" {MAX_BYTES} bytes; choose a smaller one")
        arrange = grouped if labels == "package" else padded
        tokens_WT, label_W = arrange(encoded, targets, length, pad)
        spread = np.unique(np.linspace(0, len(tokens_WT) - 1, min(limit or len(tokens_WT), len(tokens_WT)), dtype=int))
        tokens_WT, label_W = tokens_WT[spread], label_W[spread]
        ids = dict(zip(("segment_ids", "positions"), documents_of(tokens_WT, eod, pad), strict=True))
        examples = Arrays(tokens=tokens_WT, label=label_W, **(ids if documents or labels == "field" else {}))
    if len(examples) == 0:
        raise UserError(f"config.data.path {path!r} holds {n_tokens} tokens in its split {split!r}, less than one"
                        f" window of config.data.length = {length}")
    content = np.frombuffer(b"".join(d.text for d in kept), np.uint8)
    info = Info(name=f"text:{path}/{split}", modality="text", length=length, num_classes=len(classes) or None,
                fingerprint=fingerprint(content, encoder.fingerprint, length, documents, limit, labels, classes),
                bytes_per_token=n_bytes / n_tokens, **encoder.info())
    return Source(examples, info)


def readable(found: Iterable[Document], path: str, split: str, heldout: float, on_bad: OnBad) -> list[Document]:
    """The documents of a split that have text; says how many were empty or bad."""
    kept, passed_over, last_bad = [], collections.Counter[str](), ""
    for document in found:
        last_bad = document.bad or last_bad
        if document.bad and on_bad == "stop":
            raise UserError(f"a bad record: {document.bad}. Repair or remove it, or let bad records be skipped"
                            " (on_bad='skip')")
        if document.bad or not document.text.strip():
            passed_over["bad" if document.bad else "empty"] += 1
        elif corpus.in_split(document.key, split, heldout):
            kept.append(document)
    if passed_over:
        log.warning("%s: skipped %d empty and %d bad documents%s", redacted(path), passed_over["empty"],
                    passed_over["bad"],
                    f", the last: {last_bad}" if last_bad else "")
    if not kept:
        raise UserError(f"config.data.path {path!r} has no readable document in its split {split!r}"
                        f" (config.data.heldout = {heldout}; {passed_over['empty']} are empty,"
                        f" {passed_over['bad']} bad{last_bad and f', the last: {last_bad}'})")
    return kept


def with_eod(document: Document, encoder: Tokenizer) -> np.ndarray:
    return np.append(encoder.encode(document.text), encoder.dtype.type(encoder.special["eod"]))


def package(key: str) -> str:
    """The top-level package of a file of Python's library; "" for a module that is in none."""
    return key.partition("/")[0] if "/" in key else ""


def largest_packages(files: list[corpus.File]) -> list[str]:
    """The names of the largest packages by bytes, sorted."""
    n_files = collections.Counter(package(f.key) for f in files)
    n_bytes = collections.Counter[str]()
    for file in files:
        n_bytes[package(file.key)] += file.path.stat().st_size
    large = [p for p, _ in n_bytes.most_common() if p not in ("", "test") and n_files[p] >= MIN_FILES]
    return sorted(large[:MAX_PACKAGES])


def grouped(encoded: list[np.ndarray], targets: list[int], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows that hold one class each: the class's documents in a row, cut; roughly balanced."""
    by_class: dict[int, list[np.ndarray]] = collections.defaultdict(list)
    for ids, target in zip(encoded, targets, strict=True):
        by_class[target].append(ids)
    cut = {c: np.concatenate(ids) for c, ids in sorted(by_class.items())}
    cut = {c: ids[: len(ids) // length * length].reshape(-1, length) for c, ids in cut.items()}
    most = max(1, int(LARGEST_TO_MEDIAN * np.median([len(x) for x in cut.values()])))
    spread = {c: x[np.linspace(0, len(x) - 1, min(most, len(x)), dtype=int)] for c, x in cut.items() if len(x)}
    tokens_WT = np.concatenate([np.empty((0, length)), *spread.values()]).astype(np.int32)
    return tokens_WT, np.repeat(list(spread), [len(x) for x in spread.values()]).astype(np.int32)


def padded(encoded: list[np.ndarray], targets: list[int], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """A window a document: its first `length` tokens, then padding."""
    tokens_WT = np.full((len(encoded), length), pad, np.int32)
    for row_T, ids in zip(tokens_WT, encoded, strict=True):
        row_T[: len(ids)] = ids[:length]
    return tokens_WT, np.asarray(targets, np.int32)
