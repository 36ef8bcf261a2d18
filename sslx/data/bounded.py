"""Reading from what may lie about its size: compressed files, headers."""

import gzip
import os
from typing import Protocol

BLOCK_BYTES = 1 << 20


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def up_to(n: int, file: Readable) -> bytearray:
    """The next n bytes, or all that are left. In blocks: read(n) would take the memory for n before it reads."""
    content = bytearray()
    while len(content) < n and (block := file.read(min(n - len(content), BLOCK_BYTES))):
        content += block
    return content


def gunzipped(path: str | os.PathLike[str], most: int) -> bytearray:
    """The content of a gzip file. Raises ValueError if it is more than `most` bytes, having read no further."""
    with gzip.open(path) as file:
        content = up_to(most + 1, file)
    if len(content) > most:
        raise ValueError(f"it decompresses to more than {most} bytes")
    return content
