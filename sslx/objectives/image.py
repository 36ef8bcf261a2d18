"""What the objectives on images share."""

from sslx.config import UserError
from sslx.data import Info

UNIT_PATCH = 16


def check_images(model, info: Info) -> None:
    """Raises UserError unless the patches of the model, if it has them, tile the data's images."""
    height, width, _ = info.shape
    patch = getattr(model, "patch", 1)
    if height % patch or width % patch:
        raise UserError(f"model.patch={patch} does not divide the {height} x {width} pixels of {info.name!r}; choose a"
                        " patch that divides both sides")


def grid_patches(model, info: Info) -> int:
    """Corpus units of an image: patches of its grid; for a network without patches, of 16 x 16 pixels (at least 1)."""
    height, width, _ = info.shape
    patch = getattr(model, "patch", UNIT_PATCH)
    return max(1, height // patch) * max(1, width // patch)
