"""Documents of text in files: plain text (a file is a document), JSONL (a line is one), Python's own library."""

import glob
import hashlib
import json
import os
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import Any, NamedTuple

from sslx.config import UserError

STDLIB = "stdlib"


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
        yield from (pathlib.Path(folder, name) for name in names)


def is_jsonl(path: pathlib.Path) -> bool:
    return path.suffix in (".jsonl", ".ndjson")


def documents(file: File, field: str = "text", label: str | None = None) -> Iterator[Document]:
    """All documents of a file; a line of JSONL that cannot be read comes with `bad`."""
    content = file.path.read_bytes()
    if not is_jsonl(file.path):
        yield Document(file.key, content)
        return
    for number, line in enumerate(content.split(b"\n"), start=1):
        yield parse(line, f"{file.path}:{number}", field, label)


def parse(line: bytes, place: str, field: str, label: str | None = None) -> Document:
    """One line of JSONL. Its text is the key of the split, so that copies never straddle it."""
    if not line.strip():
        return Document("", b"")
    try:
        record = json.loads(line)
        text = record[field].encode("utf-8", "replace")
        return Document(record[field], text, None if label is None else record[label])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        wanted = f"a JSON object with a string {field!r}" + (f" and a {label!r}" if label else "")
        return Document("", b"", bad=f"{place} is not {wanted} ({type(error).__name__}: {error})")


def lines(path: pathlib.Path, start: int, stop: int) -> bytes:
    """The whole lines of a file that begin in its bytes start .. stop."""
    with open(path, "rb") as f:
        if start > 0:
            f.seek(start - 1)
            f.readline()  # the rest of a line that begins before `start`
        begin = f.tell()
        if begin >= stop:
            return b""
        content = f.read(stop - begin)
        return content if content.endswith(b"\n") else content + f.readline()


def heldout(key: str, fraction: float) -> bool:
    """Whether a document is held out: by a hash of its key alone, so a larger fraction holds out a superset."""
    digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def in_split(key: str, split: str, fraction: float) -> bool:
    return split == "all" or heldout(key, fraction) == (split == "heldout")
