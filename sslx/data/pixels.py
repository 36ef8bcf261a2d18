"""Encoded images to pixels, within bounds: an image is data, whatever its bytes say."""

import contextlib
import io
import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from sslx.data import BadRecord

# Told by content, not by name. Pillow knows more formats; for one of those, EPS, it runs a program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 1 << 26  # 64 megapixels: more is a decompression bomb, or not for training
MAX_BYTES = 4 * MAX_PIXELS


@contextlib.contextmanager
def opened(content: bytes, record: str) -> Iterator[Image.Image]:
    """An image that is whole as far as its format can tell. Raises BadRecord, also for what its decoding raises."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
            image.verify()  # the checksums of a PNG; decoding would not look at them
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            yield image
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise BadRecord(record, f"not an image that can be decoded ({error})") from error


def read(path: pathlib.Path, size: int) -> np.ndarray:
    """What `decode` makes of a file. Raises BadRecord, also for one that cannot be read or is too large."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadRecord(str(path), f"more than {MAX_BYTES} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise BadRecord(str(path), str(error)) from error
    return decode(content, size, str(path))


def decode(content: bytes, size: int, record: str) -> np.ndarray:
    """An encoded image -> uint8[size, size, 3]: the centre square, scaled. Raises BadRecord."""
    with opened(content, record) as image:
        image.draft("RGB", (size, size))  # lets a JPEG decode at a fraction of its size
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        # From the square alone: scaled whole, an image of 1 x 1,000,000 pixels would become one of many gigabytes.
        square = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR,
                                             box=(left, top, left + side, top + side))
    return np.asarray(square)
