"""How a picture lies in its file, by the orientation that EXIF and TIFF have: depth and guides are turned upright."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

ORIENTATION_TAG = 274
UPRIGHT = 1


def known_orientation(value: object) -> int:
    """Return what the tag says, 1 to 8; whatever else stands there means upright."""
    return int(value) if isinstance(value, int) and 1 <= value <= 8 else UPRIGHT


def upright_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    """Return (width, height) of what `upright` makes of a stored picture."""
    return (height, width) if orientation >= 5 else (width, height)


def upright(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn a stored picture, (H, W) or (H, W, channels), upright; the result is a view."""
    # EXIF: 5 to 8 are transposed; then rows, columns or both run backwards.
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image
