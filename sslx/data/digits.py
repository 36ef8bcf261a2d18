"""Handwritten digits that ship with scikit-learn: 1797 images of 8 x 8, for smoke tests and the quick start."""

from typing import Literal

import numpy as np

from sslx.config import Natural
from sslx.data import Info, Source
from sslx.data.arrays import Arrays
from sslx.data.fingerprint import fingerprint

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SAID = ("{}", "the digit {}", "a {} by hand", "it says {}")


def make(*, split: Literal["train", "test"], captions: Natural = 0) -> Source:
    """image uint8[8, 8, 1], label int32; every fifth image is in the test split (360), the others train (1437).

    captions: bytes of a caption, in words of few kinds, as tokens and segment_ids; none if 0.
    """
    from sklearn.datasets import load_digits  # takes a second to import; other sources need none of it

    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 5 == 0) == (split == "test")
    image_NHWC = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)[..., None]
    label_N = digits.target[chosen].astype(np.int32)
    info = Info(name=f"digits/{split}", modality="image", shape=(8, 8, 1), num_classes=10, classes=WORDS,
                fingerprint=fingerprint(image_NHWC, label_N))
    if not captions:
        return Source(Arrays(image=image_NHWC, label=label_N), info)
    from sslx.data import tokenize  # images alone need none of it
    from sslx.data.captions import padded

    encoder = tokenize.load("bytes")
    texts = [SAID[i % len(SAID)].format(WORDS[label]) for i, label in enumerate(label_N)]
    tokens_NT, segments_NT = padded(texts, encoder, captions)
    info = info._replace(modality="image_text", length=captions, fingerprint=fingerprint(info.fingerprint, tokens_NT),
                         encode=lambda texts: padded(texts, encoder, captions), **encoder.info())
    return Source(Arrays(image=image_NHWC, label=label_N, tokens=tokens_NT, segment_ids=segments_NT), info)
