"""Reading from what may lie about its size: compressed files, headers."""

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
