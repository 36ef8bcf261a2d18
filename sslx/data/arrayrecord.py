"""Examples in ArrayRecord files: random access to any number of them, from any number of processes.

A record is its header's length (4 bytes, little-endian), a JSON header {field: [dtype, shape]}, and the
fields' bytes in that order. Nothing is unpickled. A field of dtype "encoded" holds a PNG or JPEG file.
ArrayRecord keeps checksums: a record whose bytes have changed is a bad record.
"""

import hashlib
import json
import math
import pathlib
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import grain
import numpy as np

from sslx.config import Count, UserError
from sslx.data import BadRecord, Example, Info, Source, header
from sslx.data.fingerprint import fingerprint
from sslx.data.pixels import decode

ENCODED = "encoded"
DTYPES = {np.dtype(kind).newbyteorder("<").str for kind in "?bBhHiIqQefd"}

Fields = Mapping[str, tuple[str, list[int]]]


class Written(NamedTuple):
    """info.json: what `write` wrote. sha256: of all records in the order in which they were written."""

    examples: header.Size
    fields: dict
    num_classes: Count | None
    vocab_size: Count | None
    sha256: str


class Records:
    """Example i is the decoded record i over all files; one that is garbled raises BadRecord."""

    def __init__(self, paths: list[str], written: Written, size: int | None):
        self.paths, self.written, self.size = paths, written, size
        self.records = grain.sources.ArrayRecordDataSource(paths)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        name = f"record {index} of {pathlib.Path(self.paths[0]).parent}"
        try:
            record = self.records[index]
        except Exception as error:  # the reader raises what its C++ status says
            raise BadRecord(name, f"cannot be read ({error})") from error
        example = unpack(record, name, self.written.fields, self.size)
        for field, below in (("tokens", self.written.vocab_size), ("label", self.written.num_classes)):
            if below and field in example and not 0 <= np.min(example[field]) <= np.max(example[field]) < below:
                raise BadRecord(name, f"its {field} are not all from 0 to below {below}")
        return example


def make(*, path: str, size: Count | None = None) -> Source:
    """The examples of all *.array_record files in the folder `path`, which `write` wrote.

    Encoded images are decoded to uint8[size, size, 3]. Raises UserError if files are missing or
    damaged, or if they hold encoded images and `size` is not given.
    """
    folder = pathlib.Path(path)
    paths = sorted(str(p) for p in folder.glob("*.array_record") if p.is_file())
    if not paths or not (folder / "info.json").is_file():
        raise UserError(f"config.data.path is {path!r}, which has no *.array_record files with an info.json. Write"
                        " them with sslx.data.arrayrecord.write(folder, examples)")
    written = read_info(folder)
    try:
        records = Records(paths, written, size)
        counted = len(records)
    except Exception as error:  # the reader raises what its C++ status says
        raise UserError(f"{folder} cannot be read ({error}): a file is truncated or damaged; write it again") from error
    if counted != written.examples:
        raise UserError(f"{folder} holds {counted} records where its info.json says {written.examples}: write it again")
    if any(dtype == ENCODED for dtype, _ in written.fields.values()) and size is None:
        raise UserError(f"{folder} holds encoded images: config.data.size says to how many pixels they are decoded")
    sizes = [(pathlib.Path(p).name, pathlib.Path(p).stat().st_size) for p in paths]
    name, digest = f"arrayrecord:{folder.name}", fingerprint(written, sizes, size)
    if "image" in written.fields:
        dtype, stored = written.fields["image"]
        shape = (size, size, 3) if dtype == ENCODED else tuple(stored)
        known = Info(name, "image", digest, shape=shape)
    else:
        known = Info(name, "text", digest, length=written.fields["tokens"][1][0])
    return Source(records, known._replace(num_classes=written.num_classes, vocab_size=written.vocab_size or 0))


def read_info(folder: pathlib.Path) -> Written:
    """Raises UserError for an info.json that `write` cannot have written."""
    file = folder / "info.json"
    try:
        written = header.load(Written, file)
        for name, field in written.fields.items():
            if not is_field(field):
                raise UserError(f"{file}.fields.{name} is {str(field)[:80]}; it takes a dtype and a shape")
        match written.fields:
            case {"image": ["encoded", _]} | {"image": [_, [_, _, _]]}:
                pass
            case {"tokens": [str(dtype), [_]]} if dtype[1] in "iu":
                pass
            case _:
                raise UserError(f"{file}.fields has neither an image of 3 dimensions nor whole tokens of one")
    except UserError as error:
        raise UserError(f"{error}: write it again, with sslx.data.arrayrecord.write(folder, examples)") from error
    return written


def is_field(field: Any) -> bool:
    match field:
        case [str(dtype), [*shape]]:
            return dtype in DTYPES | {ENCODED} and all(type(n) is int and 0 < n < 2**31 for n in shape)
    return False


def write(folder: str, examples: Iterable[Mapping[str, np.ndarray | bytes]], *, shards: int = 1,
          num_classes: int | None = None, vocab_size: int | None = None) -> None:
    """Writes examples of equal fields, round robin over `shards` files; a value of bytes is an encoded image."""
    from array_record.python.array_record_module import ArrayRecordWriter

    root = pathlib.Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    # One record a group: a larger one is decompressed whole to read one record at random.
    writers = [ArrayRecordWriter(str(root / f"{k:05d}.array_record"), "group_size:1") for k in range(shards)]
    fields: Fields = {}
    digest = hashlib.sha256()
    count = 0
    for count, example in enumerate(examples, start=1):
        record, found = pack(example)
        fields = fields or found
        if layout(found) != layout(fields):
            raise UserError(f"example {count - 1} has the fields {found} where the first has {fields}: a batch takes"
                            " examples of one layout")
        digest.update(record)
        writers[(count - 1) % shards].write(record)
    for writer in writers:
        writer.close()
    written = Written(count, dict(fields), num_classes, vocab_size, digest.hexdigest())
    (root / "info.json").write_text(json.dumps(written._asdict()))


def pack(example: Mapping[str, np.ndarray | bytes]) -> tuple[bytes, Fields]:
    """The record of an example, and its fields."""
    fields, body = {}, b""
    for name, value in example.items():
        if isinstance(value, bytes):
            fields[name] = (ENCODED, [len(value)])
            body += value
        else:
            array = np.asarray(value)
            little = array.dtype.newbyteorder("<")
            if little.str not in DTYPES:
                raise UserError(f"the field {name!r} is of {array.dtype}; a record takes numbers, or bytes of an image")
            array = array.astype(little)
            fields[name] = (array.dtype.str, list(array.shape))
            body += array.tobytes()
    head = json.dumps(fields).encode()
    return struct.pack("<I", len(head)) + head + body, fields


def unpack(record: bytes, name: str, expected: Fields, size: int | None = None) -> Example:
    """The example of a record with the `expected` fields. Raises BadRecord if its parts do not fit."""
    example = {}
    try:
        (length,) = struct.unpack_from("<I", record)
        fields = json.loads(record[4 : 4 + length])
        if layout(fields) != layout(expected):
            raise ValueError(f"its fields are not {dict(expected)}")
        offset = 4 + length
        for field, (dtype, shape) in fields.items():
            if dtype == ENCODED:
                example[field] = decode(record[offset : offset + shape[0]], size or 1, name)
                offset += shape[0]
            else:
                array = np.frombuffer(record, dtype, math.prod(shape), offset).reshape(shape)
                example[field] = array[()]
                offset += array.nbytes
        if offset != len(record):
            raise ValueError(f"{len(record)} bytes where its header says {offset}")
    except BadRecord:
        raise
    except Exception as error:  # bytes at random can fail in any of these steps
        raise BadRecord(name, f"garbled ({error})") from error
    return example


def layout(fields: Fields) -> dict[str, tuple[str, list[int]]]:
    """What the examples of a batch must share: all but the lengths of encoded images."""
    return {name: (dtype, [] if dtype == ENCODED else list(shape)) for name, (dtype, shape) in fields.items()}
