"""Text to sharded token arrays, in parallel processes, resumable after a kill.

    python -m sslx.data.prepare --input stdlib --out tokens/stdlib
    python -m sslx.data.prepare --input 'wiki/*.jsonl' --out tokens/wiki --tokenizer bpe.json --workers 16

The input is cut into shards by its bytes alone, so every run of one command makes the same shards. A
shard is renamed into place when it is whole and the manifest is written last: run a killed command
again and it goes on. The folder then holds <split>-<shard>.bin (little-endian integers, an eod after
each document), manifest.json and the tokenizer. Read it with the data source `tokens`.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from sslx.config import UserError
from sslx.data import corpus, header, tokenize, tokens
from sslx.data.corpus import Document, File
from sslx.data.header import Size
from sslx.data.tokens import Manifest, Shard

RATIO_SAMPLE_BYTES = 1 << 18
MAX_SHARD_TOKENS = 1 << 30


class Piece(NamedTuple):
    """The lines of a file that begin in its bytes start .. stop."""

    path: str
    key: str
    start: int
    stop: int
    size: int


class Plan(NamedTuple):
    """All that the output depends on; kept in the folder to refuse another one."""

    shards: list[list[Piece]]
    tokenizer: Literal["bytes", "tokenizer.json"]
    tokenizer_fingerprint: str
    dtype: Literal["<u2", "<u4"]
    heldout: float
    jsonl_field: str
    inputs: str


class Begun(NamedTuple):
    """plan.json: the digest of the plan that the folder was begun with."""

    plan: str


class Done(NamedTuple):
    """shard-<shard>.json: what was skipped, and the file of each split that has one."""

    empty: Size
    bad: Size
    train: dict | None = None
    heldout: dict | None = None


def prepare(*, inputs: Sequence[str], out: str, tokenizer: str = "bytes", shard_tokens: int = 1 << 26,
            heldout: float = 0.0, workers: int = 1, jsonl_field: str = "text") -> dict:
    """Writes the folder `out` and returns its manifest. Raises UserError if it holds something else."""
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS or not 0 <= heldout < 1 or workers < 1:
        raise UserError(f"--shard-tokens {shard_tokens} and --workers {workers} must be positive (a shard of at most"
                        f" {MAX_SHARD_TOKENS} tokens) and --heldout {heldout} a fraction from 0 to below 1")
    folder = pathlib.Path(out)
    plan = make_plan(inputs, tokenizer, shard_tokens, heldout, jsonl_field)
    begin(folder, plan, tokenizer)
    if (folder / "manifest.json").is_file():
        return tokens.read_manifest(folder)[0]._asdict()
    todo = [k for k in range(len(plan.shards)) if not record_path(folder, k).is_file()]
    n_before, n_shards = len(plan.shards) - len(todo), len(plan.shards)
    for done, _ in enumerate(run(functools.partial(write_shard, folder, plan), todo, workers), start=n_before + 1):
        print(f"shard {done} of {n_shards}", file=sys.stderr, flush=True)
    return write_manifest(folder, plan)


def make_plan(inputs: Sequence[str], tokenizer: str, shard_tokens: int, heldout: float, jsonl_field: str) -> Plan:
    encoder = tokenize.load(tokenizer)
    files = [file for path in inputs for file in corpus.files(path, "--input")]
    stats = [(str(f.path.resolve()), f.path.stat()) for f in files]
    shard_bytes = max(1, round(shard_tokens * bytes_per_token(files, encoder)))
    return Plan(
        shards=partition(files, shard_bytes),
        tokenizer="bytes" if tokenizer == "bytes" else "tokenizer.json",
        tokenizer_fingerprint=encoder.fingerprint,
        dtype="<u2" if encoder.dtype.itemsize == 2 else "<u4",
        heldout=heldout,
        jsonl_field=jsonl_field,
        inputs=hashlib.sha256(repr([(p, s.st_size, s.st_mtime_ns) for p, s in stats]).encode()).hexdigest(),
    )


def bytes_per_token(files: list[File], encoder: tokenize.Tokenizer) -> float:
    """Of the beginning of the first file that is not empty, to cut shards by bytes."""
    for file in files:
        with open(file.path, "rb") as f:
            sample = f.read(RATIO_SAMPLE_BYTES)
        if sample.strip():
            return len(sample) / len(encoder.encode(sample))
    raise UserError("all files of --input are empty")


def partition(files: list[File], shard_bytes: int) -> list[list[Piece]]:
    """Shards of about `shard_bytes`: several whole files, or a part of one that is larger, cut at ends of lines."""
    shards: list[list[Piece]] = [[]]
    filled = 0
    for file in files:
        size = file.path.stat().st_size
        for start in range(0, max(1, size), shard_bytes):
            stop = min(size, start + shard_bytes)
            if filled + stop - start > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(Piece(str(file.path), file.key, start, stop, size))
            filled += stop - start
    return [pieces for pieces in shards if pieces]


def begin(folder: pathlib.Path, plan: Plan, tokenizer: str) -> None:
    """Makes the folder, or checks that it was begun with the same plan."""
    digest = hashlib.sha256(json.dumps(plan).encode()).hexdigest()
    plan_file = folder / "plan.json"
    if plan_file.is_file():
        if header.load(Begun, plan_file).plan != digest:
            raise UserError(f"{folder} was begun with other inputs or options (or an input has changed since):"
                            " choose another --out, or delete it")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and was not made by this command: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.partial"):
        leftover.unlink()
    if plan.tokenizer != "bytes":
        shutil.copyfile(tokenizer, folder / "tokenizer.json.partial")
        os.replace(folder / "tokenizer.json.partial", folder / "tokenizer.json")
    write_whole(plan_file, json.dumps({"plan": digest}).encode())


def run(task, todo: list[int], workers: int) -> Iterator:
    if workers == 1 or len(todo) < 2:
        yield from map(task, todo)
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, initializer=die_with_parent) as pool:
        yield from pool.map(task, todo)


def die_with_parent() -> None:
    """Ends this worker when its parent is killed; it would wait for work forever."""
    parent = multiprocessing.parent_process()

    def watch():
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_shard(folder: pathlib.Path, plan: Plan, k: int) -> None:
    """Tokenizes shard k into an array for each split, then writes down what it counted."""
    encoder = tokenize.load("bytes" if plan.tokenizer == "bytes" else str(folder / plan.tokenizer))
    eod = np.array([encoder.special["eod"]], encoder.dtype)
    arrays: dict[str, list[np.ndarray]] = {"train": [], "heldout": []}
    counts = {split: dict(documents=0, bytes=0) for split in arrays}
    skipped = dict(empty=0, bad=0)
    for document, begins, ends in (d for piece in plan.shards[k] for d in read_piece(piece, plan.jsonl_field)):
        if document.bad or (begins and ends and not document.text.strip()):
            skipped["bad" if document.bad else "empty"] += 1
            continue
        split = "heldout" if corpus.heldout(document.key, plan.heldout) else "train"
        arrays[split] += [encoder.encode(document.text)] + [eod] * ends
        counts[split]["documents"] += ends
        counts[split]["bytes"] += len(document.text)
    done: dict = dict(skipped)
    for split, pieces in arrays.items():
        content = np.concatenate([eod[:0], *pieces]).astype(plan.dtype).tobytes()
        if content:
            file = f"{split}-{k:05d}.bin"
            write_whole(folder / file, content)
            done[split] = Shard(file, len(content) // np.dtype(plan.dtype).itemsize, **counts[split],
                                sha256=hashlib.sha256(content).hexdigest())._asdict()
    write_whole(record_path(folder, k), json.dumps(Done(**done)._asdict()).encode())


def read_piece(piece: Piece, field: str) -> Iterator[tuple[Document, bool, bool]]:
    """The documents of a piece, and whether each begins and ends here: a large text file is one in many pieces.

    What cannot be read of one that is in many pieces raises UserError: it would be another document without it.
    """
    path = pathlib.Path(piece.path)
    try:
        lines = list(corpus.lines(path, piece.start, piece.stop))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if corpus.is_jsonl(path):
        for line in lines:
            yield corpus.parse(line, f"{path} after byte {piece.start}", field), True, True
        return
    content, begins, ends = b"".join(lines), piece.start == 0, piece.stop == piece.size
    too_long = max(map(len, lines), default=0) > corpus.MAX_LINE_BYTES
    bad = f"a line is longer than {corpus.MAX_LINE_BYTES} bytes" if too_long else corpus.not_text(content)
    if bad and not (begins and ends):
        raise UserError(f"{path} after byte {piece.start}: {bad}. Repair the file, or remove it from --input")
    yield Document(piece.key, b"" if bad else content, bad=bad), begins, ends


def record_path(folder: pathlib.Path, k: int) -> pathlib.Path:
    return folder / f"shard-{k:05d}.json"


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def write_manifest(folder: pathlib.Path, plan: Plan) -> dict:
    records = [header.load(Done, record_path(folder, k)) for k in range(len(plan.shards))]
    splits = {split: [s for record in records if (s := getattr(record, split))] for split in ("train", "heldout")}
    totals = {f"{split}_{what}": sum(s[what] for s in shards)
              for split, shards in splits.items() for what in ("documents", "tokens", "bytes")}
    if totals["train_tokens"] == 0:
        raise UserError("--input holds no document with text for the split train")
    n_tokens = totals["train_tokens"] + totals["heldout_tokens"]
    n_bytes = totals["train_bytes"] + totals["heldout_bytes"]
    manifest = Manifest(format="sslx tokens", version=1, dtype=plan.dtype, tokenizer=plan.tokenizer,
                        tokenizer_fingerprint=plan.tokenizer_fingerprint, **totals, bytes_per_token=n_bytes / n_tokens,
                        skipped_empty=sum(r.empty for r in records), skipped_bad=sum(r.bad for r in records),
                        splits=splits)._asdict()
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def verify(folder: pathlib.Path) -> int:
    """Prints what is damaged. Returns 1 if a shard is, else 0."""
    found = tokens.damage(folder)
    print(*found or [f"{folder}: every shard is as it was written"], sep="\n")
    return 1 if found else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sslx.data.prepare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--input", nargs="+", dest="inputs", help="text or JSONL files, folders, patterns, or stdlib")
    task.add_argument("--verify", type=pathlib.Path, metavar="FOLDER", help="only compare it with its checksums")
    parser.add_argument("--out", help="the folder to write")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, or a JSON file of the tokenizers library")
    parser.add_argument("--shard-tokens", type=int, default=1 << 26, help="about how many tokens make a shard")
    parser.add_argument("--heldout", type=float, default=0.0, help="fraction of documents for the split heldout")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--jsonl-field", default="text", help="the field of a JSONL line that holds its text")
    options = vars(parser.parse_args(argv))
    if folder := options.pop("verify"):
        return verify(folder)
    if options["out"] is None:
        parser.error("--out is missing: the folder to write")
    for key, value in prepare(**options).items():
        if key != "splits":
            print(f"{key}: {value}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
