"""Handwritten digits that ship with scikit-learn: 1797 images of 8 x 8, for smoke tests and the quick start."""

from typing import Literal

import numpy as np

from sslx.data import Info, Source
from sslx.data.arrays import Arrays
from sslx.data.fingerprint import fingerprint


def make(*, split: Literal["train", "test"]) -> Source:
    """image uint8[8, 8, 1], label int32; every fifth image is in the test split (360), the others train (1437)."""
    from sklearn.datasets import load_digits  # takes a second to import; other sources need none of it

    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 5 == 0) == (split == "test")
    image_NHWC = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)[..., None]
    label_N = digits.target[chosen].astype(np.int32)
    info = Info(name=f"digits/{split}", modality="image", shape=(8, 8, 1), num_classes=10,
                fingerprint=fingerprint(image_NHWC, label_N))
    return Source(Arrays(image=image_NHWC, label=label_N), info)
