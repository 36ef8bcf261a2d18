"""What the objectives on images share."""

from sslx.data import Info

UNIT_PATCH = 16


def grid_patches(model, info: Info) -> int:
    """Corpus units of an image: patches of its grid; for a network without patches, of 16 x 16 pixels (at least 1)."""
    height, width, _ = info.shape
    patch = getattr(model, "patch", UNIT_PATCH)
    return max(1, height // patch) * max(1, width // patch)
