"""Tokenizers: bytes, or a byte-level BPE that `tokenizers` trained.

    python -m sslx.data.tokenize train --vocab-size 8192 --out bpe.json PATHS...

The special tokens stand at the end of every vocabulary: eod (end of document), mask, pad and 100
sentinels (span corruption). No text can encode to one of them.
"""

import argparse
import contextlib
import hashlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sslx.config import UserError
from sslx.data import corpus

MAX_BYTES = 1 << 28  # of a tokenizer's file; a vocabulary of 256k has 30 MB
N_SENTINELS = 100
SPECIAL = ("<|eod|>", "<|mask|>", "<|pad|>", *(f"<|sentinel_{i}|>" for i in range(N_SENTINELS)))


class Tokenizer(NamedTuple):
    """encode:      text -> ids [T] in the narrowest unsigned type that holds the vocabulary.
    decode:      ids -> text; special tokens are left out, invalid UTF-8 is replaced.
    vocab_size:  special tokens included.
    special:     ids of "eod", "mask", "pad" and "sentinel" (the first of N_SENTINELS).
    word_starts: for each id, whether a token begins a word: it begins with white space, or is special.
    fingerprint: changes when the encoding does.
    """

    encode: Callable[[str | bytes], np.ndarray]
    decode: Callable[[Sequence[int]], str]
    vocab_size: int
    special: dict[str, int]
    word_starts: tuple[bool, ...]
    fingerprint: str
    dtype: np.dtype

    def info(self) -> dict[str, Any]:
        """What a source's Info says of its tokenizer."""
        return dict(vocab_size=self.vocab_size, special=self.special, n_sentinels=N_SENTINELS,
                    word_starts=self.word_starts, decode=self.decode)


def load(name: str) -> Tokenizer:
    """The tokenizer "bytes", or that of a JSON file of the `tokenizers` library."""
    return byte_tokenizer() if name == "bytes" else bpe_tokenizer(name)


def byte_tokenizer() -> Tokenizer:
    """Ids 0..255 are bytes, then the special tokens."""

    def encode(text: str | bytes) -> np.ndarray:
        return np.frombuffer(as_bytes(text), np.uint8).astype(np.uint16)

    def decode(ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", "replace")

    word_starts = tuple(bytes([i]).isspace() for i in range(256)) + (True,) * len(SPECIAL)
    return Tokenizer(encode, decode, 256 + len(SPECIAL), special_ids(256), word_starts, "bytes", np.dtype(np.uint16))


def bpe_tokenizer(path: str) -> Tokenizer:
    """A tokenizer from a JSON file; special tokens that it lacks are added at its end."""
    with explained(path):
        if os.path.getsize(path) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        content = pathlib.Path(path).read_bytes()
        bpe = tokenizers.Tokenizer.from_str(content.decode())
        # A document is encoded whole, as it is, and always alike, whatever the file was saved with.
        bpe.no_truncation()
        bpe.no_padding()
        if isinstance(bpe.model, models.BPE):
            bpe.model.dropout = None
        bpe.add_special_tokens(list(SPECIAL))
        bpe.encode_special_tokens = True  # a document that spells out "<|eod|>" holds seven characters, no end
        vocab_size, ids = bpe.get_vocab_size(), [bpe.token_to_id(s) for s in SPECIAL]
        if sorted(bpe.get_vocab().values()) != list(range(vocab_size)):
            raise ValueError("its ids are not 0, 1, 2, ...")
        first = vocab_size - len(SPECIAL)
        if ids != list(range(first, vocab_size)):
            raise ValueError("its special tokens are not consecutive at the end of the vocabulary")
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)

    def encode(text: str | bytes) -> np.ndarray:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        with explained(path):
            return np.array(bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype)

    def decode(ids: Sequence[int]) -> str:
        return bpe.decode([int(i) for i in ids], skip_special_tokens=True)

    # Of the byte-level alphabet, these four stand for space, newline, tab and carriage return.
    word_starts = tuple((bpe.id_to_token(i) or "").startswith(("Ġ", "Ċ", "ĉ", "č")) or i >= first
                        for i in range(vocab_size))
    digest = hashlib.sha256(content).hexdigest()[:16]
    return Tokenizer(encode, decode, vocab_size, special_ids(first), word_starts, digest, dtype)


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """What is wrong with a tokenizer file as a UserError. The library raises bare Exceptions, and panics are none."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(f"the tokenizer {path} cannot be used ({error}). It takes 'bytes' or a JSON file of the"
                        " tokenizers library: python -m sslx.data.tokenize train --vocab-size 8192"
                        f" --out {path} PATHS...") from error


def special_ids(first: int) -> dict[str, int]:
    return {"eod": first, "mask": first + 1, "pad": first + 2, "sentinel": first + 3}


def as_bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8", "replace") if isinstance(text, str) else text


def train(paths: Sequence[str], vocab_size: int, out: str, field: str = "text") -> Tokenizer:
    """Trains a byte-level BPE of `vocab_size` tokens, the special ones included, and writes it to `out`.

    A small corpus may have fewer merges to offer than asked for. Sennrich et al. 2016 (1508.07909).
    """
    smallest = 256 + len(SPECIAL)
    if vocab_size < smallest:
        raise UserError(f"--vocab-size is {vocab_size}; bytes and special tokens alone are {smallest}")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    found = (corpus.documents(file, field) for path in paths for file in corpus.files(path, "PATHS"))
    bpe.train_from_iterator((d.text.decode("utf-8", "replace") for docs in found for d in docs if not d.bad),
                            trainer)
    bpe.add_special_tokens(list(SPECIAL))
    pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
    bpe.save(out)
    return load(out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sslx.data.tokenize", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    command = parser.add_subparsers(required=True).add_parser("train", help="train a byte-level BPE")
    command.add_argument("paths", nargs="+", help="text files, folders, patterns, JSONL files, or stdlib")
    command.add_argument("--vocab-size", type=int, required=True, help="tokens, special ones included")
    command.add_argument("--out", required=True, help="the JSON file to write")
    command.add_argument("--jsonl-field", default="text")
    options = parser.parse_args(argv)
    trained = train(options.paths, options.vocab_size, options.out, options.jsonl_field)
    print(f"{options.out}: {trained.vocab_size} tokens")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
