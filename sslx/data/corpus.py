"""Documents of text in files: plain text (a file is a document), JSONL (a line is one), Python's own library."""

import glob
import hashlib
import json
import os
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from sslx.config import UserError

STDLIB = "stdlib"
MAX_LINE_BYTES = 1 << 25  # of JSONL a document, of text what a shard may be longer than it should


class File(NamedTuple):
    """key: the path relative to what the user named; the split is drawn from it, on any machine alike."""

    path: pathlib.Path
    key: str


class Document(NamedTuple):
    """key: what its split is drawn from. bad: why it could not be read, or None."""

    key: str
    text: bytes
    label: Any = None
    bad: str | None = None


def files(path: str, where: str) -> list[File]:
    """The files that `path` names, sorted: a file, a folder, a pattern, or "stdlib" (Python's own *.py)."""
    if path == STDLIB:
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        found = [p for p in walk(root, prune=("site-packages", "dist-packages", "__pycache__")) if p.suffix == ".py"]
    elif os.path.isdir(path):
        root = pathlib.Path(path)
        found = [p for p in walk(root, prune=()) if not p.name.startswith(".")]
    else:
        found = [pathlib.Path(p) for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
        root = pathlib.Path(os.path.commonpath([p.parent for p in found])) if found else pathlib.Path()
    if not found:
        raise UserError(f"{where} is {path!r}, where there is no file. It takes a text or JSONL file, a folder, a"
                        f" pattern such as 'books/**/*.txt', or {STDLIB!r} for Python's own library")
    return sorted((File(p, p.relative_to(root).as_posix()) for p in found), key=lambda f: f.key)


def walk(root: pathlib.Path, prune: tuple[str, ...]) -> Iterator[pathlib.Path]:
    for folder, inner, names in os.walk(root):
        inner[:] = [d for d in inner if d not in prune and not d.startswith(".")]
        paths = (pathlib.Path(folder, name) for name in names)
        yield from (path for path in paths if path.is_file())  # a pipe would be waited for


def is_jsonl(path: pathlib.Path) -> bool:
    return path.suffix in (".jsonl", ".ndjson")


def documents(file: File, field: str = "text", label: str | None = None) -> Iterator[Document]:
    """All documents of a file; a file or a line of JSONL that cannot be read comes with `bad`."""
    try:
        if is_jsonl(file.path):
            for number, line in enumerate(lines(file.path, 0, file.path.stat().st_size), start=1):
                yield parse(line, f"{file.path}:{number}", field, label)
        else:
            content = file.path.read_bytes()
            bad = not_text(content)
            yield Document(file.key, b"", bad=f"{file.path}: {bad}") if bad else Document(file.key, content)
    except OSError as error:
        yield Document(file.key, b"", bad=f"{file.path} cannot be read ({error})")


def parse(line: bytes, place: str, field: str, label: str | None = None) -> Document:
    """One line of JSONL. Its text is the key of the split, so that copies never straddle it."""
    if not line.strip():
        return Document("", b"")
    if len(line) > MAX_LINE_BYTES:
        return Document("", b"", bad=f"{place} is longer than {MAX_LINE_BYTES} bytes")
    try:
        record = json.loads(line)
        text = record[field].encode()
        value = None if label is None else record[label]
        if not isinstance(value, str | int | None):
            raise TypeError(f"the {label} is {type(value).__name__}")
        return Document(record[field], text, value)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        wanted = f"a JSON object with a string {field!r}" + (f" and a string or integer {label!r}" if label else "")
        return Document("", b"", bad=f"{place} is not {wanted} ({type(error).__name__}: {error})")


def not_text(content: bytes) -> str | None:
    """Why these bytes are no text; None if they are."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start})"
    if b"\0" in content:
        return f"no text: byte {content.index(0)} is zero, as a crash can leave them"
    return None


def lines(path: pathlib.Path, start: int, stop: int) -> Iterator[bytes]:
    """The lines of a file that begin in its bytes start .. stop; of one that is too long, MAX_LINE_BYTES + 1 bytes."""
    with open(path, "rb") as f:
        begin = 0
        if start > 0:
            f.seek(start - 1)  # the rest of a line that begins before `start` is no line
            begin = start - 1 + skip_line(f, stop - start + 1)
        while begin < stop and (line := f.readline(MAX_LINE_BYTES + 1)):
            begin += len(line)
            begin += 0 if line.endswith(b"\n") else skip_line(f, stop - begin)
            yield line


def skip_line(file: IO[bytes], most: int) -> int:
    """Reads to the end of the line, but no more than `most` bytes; how many that were."""
    n = 0
    while n < most and (part := file.readline(min(MAX_LINE_BYTES, most - n))):
        n += len(part)
        if part.endswith(b"\n"):
            break
    return n


def heldout(key: str, fraction: float) -> bool:
    """Whether a document is held out: by a hash of its key alone, so a larger fraction holds out a superset."""
    digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def in_split(key: str, split: str, fraction: float) -> bool:
    return split == "all" or heldout(key, fraction) == (split == "heldout")
