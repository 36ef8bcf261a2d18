"""The manifest of a checkpoint: what each of its files must hold, so that no damaged one is ever restored.

    <crc32 of all that follows>
    <crc32> <bytes> <path>
    ...

CRC-32 finds every flip of up to 32 bits in a row and lets one in 4e9 of all other damages pass; zlib, which Python
has, computes it faster than disks read. The manifest says what was on the disk when it was written, right after
the files; it is no signature: who can write files can write a manifest.
"""

import concurrent.futures
import pathlib
import zlib

NAME = "MANIFEST"
BLOCK_BYTES = 2**20


def of(folder: pathlib.Path) -> str:
    """The text of the manifest of all files under `folder` but that of an older one."""
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != NAME)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        checksums = pool.map(lambda file: checksum(folder / file), files)
    lines = "".join(f"{found} {file}\n" for found, file in zip(checksums, files, strict=True))
    return f"{zlib.crc32(lines.encode()):08x}\n{lines}"


def damage(folder: pathlib.Path) -> list[str]:
    """"file: what is wrong with it" for every damaged file under `folder`; files the manifest lacks are nobody's."""
    try:
        head, _, lines = (folder / NAME).read_bytes().partition(b"\n")
    except OSError as error:
        return [f"{NAME}: {error.strerror}"]
    if head != b"%08x" % zlib.crc32(lines):
        return [f"{NAME}: other bytes than were saved"]

    def wrong(line: str) -> str | None:
        crc, n_bytes, file = (*line.split(" ", 2), "", "")[:3]
        path = folder / file
        if not path.resolve().is_relative_to(folder.resolve()) or (path.exists() and not path.is_file()):
            return f"{NAME}: {line!r} is no file of a checkpoint"
        try:
            found_crc, found_bytes = checksum(path).split()
        except OSError as error:
            return f"{file}: {error.strerror}"
        if found_bytes != n_bytes:
            return f"{file}: {found_bytes} bytes, {n_bytes} were saved"
        return None if found_crc == crc else f"{file}: other bytes than were saved"

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return [found for found in pool.map(wrong, lines.decode(errors="replace").splitlines()) if found]


def checksum(file: pathlib.Path) -> str:
    """"<crc32> <bytes>" of what a file holds. Raises OSError if it cannot be read."""
    crc = n_bytes = 0
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(BLOCK_BYTES):
            crc, n_bytes = zlib.crc32(block, crc), n_bytes + len(block)
    return f"{crc:08x} {n_bytes}"
