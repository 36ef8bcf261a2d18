"""Examples in ArrayRecord files: random access to any number of them, from any number of processes.

A record is its header's length (4 bytes, little-endian), a JSON header {field: [dtype, shape]}, and the
fields' bytes in that order. Nothing is unpickled. A field of dtype "encoded" holds a PNG or JPEG file.
"""

import json
import pathlib
import struct
from collections.abc import Iterable, Mapping

import grain
import numpy as np

from sslx.config import UserError
from sslx.data import BadRecord, Example, Info, Source
from sslx.data.fingerprint import fingerprint
from sslx.data.folder import decode

ENCODED = "encoded"


class Records:
    """Example i is the decoded record i over all files; one that is garbled raises BadRecord."""

    def __init__(self, paths: list[str], size: int | None):
        self.paths, self.size = paths, size
        self.records = grain.sources.ArrayRecordDataSource(paths)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        name = f"record {index} of {pathlib.Path(self.paths[0]).parent}"
        try:
            record = self.records[index]
        except Exception as error:  # the reader raises what its C++ status says
            raise BadRecord(name, f"cannot be read ({error})") from error
        return unpack(record, name, self.size)


def make(*, path: str, size: int | None = None) -> Source:
    """The examples of all *.array_record files in the folder `path`, which `write` wrote.

    Encoded images are decoded to uint8[size, size, 3]. Raises UserError if files are missing or
    damaged, or if they hold encoded images and `size` is not given.
    """
    folder = pathlib.Path(path)
    paths = sorted(str(p) for p in folder.glob("*.array_record"))
    if not paths or not (folder / "info.json").is_file():
        raise UserError(f"config.data.path is {path!r}, which has no *.array_record files with an info.json. Write"
                        " them with sslx.data.arrayrecord.write(folder, examples)")
    try:
        info = json.loads((folder / "info.json").read_text())
        records = Records(paths, size)
        counted, expected = len(records), info["examples"]
        fields, num_classes = info["fields"], info["num_classes"]
    except Exception as error:
        raise UserError(f"{folder} cannot be read ({error}): a file is truncated or damaged; write it again") from error
    if counted != expected:
        raise UserError(f"{folder} holds {counted} records where its info.json says {expected}: write it again")
    if any(dtype == ENCODED for dtype, _ in fields.values()) and size is None:
        raise UserError(f"{folder} holds encoded images: config.data.size says to how many pixels they are decoded")
    sizes = [(pathlib.Path(p).name, pathlib.Path(p).stat().st_size) for p in paths]
    name, digest = f"arrayrecord:{folder.name}", fingerprint(info, sizes, size, records.records[0])
    if "image" in fields:
        dtype, stored = fields["image"]
        shape = (size, size, 3) if dtype == ENCODED else tuple(stored)
        known = Info(name, "image", digest, shape=shape)
    else:
        known = Info(name, "text", digest, length=fields["tokens"][1][0])
    return Source(records, known._replace(num_classes=num_classes, vocab_size=info["vocab_size"] or 0))


def write(folder: str, examples: Iterable[Mapping[str, np.ndarray | bytes]], *, shards: int = 1,
          num_classes: int | None = None, vocab_size: int | None = None) -> None:
    """Writes examples of equal fields, round robin over `shards` files; a value of bytes is an encoded image."""
    from array_record.python.array_record_module import ArrayRecordWriter

    root = pathlib.Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    # One record a group: a larger one is decompressed whole to read one record at random.
    writers = [ArrayRecordWriter(str(root / f"{k:05d}.array_record"), "group_size:1") for k in range(shards)]
    fields: dict[str, tuple[str, list[int]]] = {}
    count = 0
    for count, example in enumerate(examples, start=1):
        record, fields = pack(example)
        writers[(count - 1) % shards].write(record)
    for writer in writers:
        writer.close()
    info = dict(examples=count, fields=fields, num_classes=num_classes, vocab_size=vocab_size)
    (root / "info.json").write_text(json.dumps(info))


def pack(example: Mapping[str, np.ndarray | bytes]) -> tuple[bytes, dict[str, tuple[str, list[int]]]]:
    """The record of an example, and its fields."""
    fields, body = {}, b""
    for name, value in example.items():
        if isinstance(value, bytes):
            fields[name] = (ENCODED, [len(value)])
            body += value
        else:
            array = np.asarray(value)
            if array.dtype.kind not in "biuf":
                raise UserError(f"the field {name!r} is of {array.dtype}; a record takes numbers, or bytes of an image")
            array = array.astype(array.dtype.newbyteorder("<"))
            fields[name] = (array.dtype.str, list(array.shape))
            body += array.tobytes()
    header = json.dumps(fields).encode()
    return struct.pack("<I", len(header)) + header + body, fields


def unpack(record: bytes, name: str, size: int | None = None) -> Example:
    """The example of a record. Raises BadRecord if its parts do not fit."""
    example, offset = {}, 0
    try:
        (length,) = struct.unpack_from("<I", record)
        fields = json.loads(record[4 : 4 + length])
        offset = 4 + length
        for field, (dtype, shape) in fields.items():
            if dtype == ENCODED:
                example[field] = decode(record[offset : offset + shape[0]], size or 1, name)
                offset += shape[0]
            elif np.dtype(dtype).kind not in "biuf":
                raise ValueError(f"the field {field!r} is of {dtype}")
            else:
                array = np.frombuffer(record, dtype, int(np.prod(shape)), offset).reshape(shape)
                example[field] = array[()]
                offset += array.nbytes
        if offset != len(record):
            raise ValueError(f"{len(record)} bytes where its header says {offset}")
    except BadRecord:
        raise
    except Exception as error:  # bytes at random can fail in any of these steps
        raise BadRecord(name, f"garbled ({error})") from error
    return example
