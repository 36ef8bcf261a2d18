"""A folder of images, one subfolder a class."""

import pathlib
from typing import Literal

import numpy as np

from sslx.config import UserError
from sslx.data import Example, Info, Source, corpus, pixels
from sslx.data.fingerprint import fingerprint

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Images:
    """Example i is the decoded file i; one that cannot be decoded raises BadRecord."""

    def __init__(self, paths: list[pathlib.Path], labels: list[int], size: int):
        self.paths, self.labels, self.size = paths, labels, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        return {"image": pixels.read(self.paths[index], self.size), "label": np.int32(self.labels[index])}


def make(*, path: str, size: int, split: Literal["train", "heldout", "all"] = "all", heldout: float = 0.05) -> Source:
    """Labelled images: image uint8[size, size, 3] (shorter side to `size`, centre crop), label int32.

    A class is a subfolder of `path`, in alphabetical order; images at any depth below belong to it.
    An image is held out by a hash of its relative path. Raises UserError if there is no image.
    """
    root = pathlib.Path(path)
    if size < 1:
        raise UserError(f"config.data.size is {size}; it takes a positive number of pixels")
    images = sorted(p for p in root.glob("*/**/*") if p.suffix.lower() in SUFFIXES and p.is_file())
    keys = {p: p.relative_to(root).as_posix() for p in images}
    classes = sorted({key.partition("/")[0] for key in keys.values()})
    images = [p for p in images if corpus.in_split(keys[p], split, heldout)]
    if not images:
        raise UserError(f"config.data.path is {path!r}, which has no image in its split {split!r}. It takes a folder"
                        f" with a subfolder for each class, with files {', '.join(SUFFIXES)}")
    labels = [classes.index(keys[p].partition("/")[0]) for p in images]
    content = [(keys[p], p.stat().st_size) for p in images]
    info = Info(name=f"folder:{root.name}/{split}", modality="image", shape=(size, size, 3), num_classes=len(classes),
                fingerprint=fingerprint(content, size))
    return Source(Images(images, labels, size), info)
