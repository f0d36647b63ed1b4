"""Guide pictures: whatever a camera or an editor saves, read as upright RGB of 8 or 16 bits."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddfup.errors import InputError
from ddfup.formats import (
    DEFAULT_MAX_PIXELS,
    PNG_MAGIC,
    TIFF_MAGICS,
    check_pixels,
    check_png,
    decoding,
    png_read,
    read_start,
    tiff_page,
)

# Pictures of several frames (MPO, what iPhones write) come in through Pillow's JPEG reader.
GUIDE_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP")
_ORIENTATION = 274  # EXIF and TIFF tag
_PILLOW_LIMIT = threading.Lock()


@dataclass(frozen=True)
class GuideHeader:
    """What a guide's header says.

    Attributes:
        width: Columns of the upright picture.
        height: Rows of the upright picture.
        orientation: EXIF orientation, 1 to 8.
        decoder: Who reads it: ``pillow``, or for 16 bits ``png`` or ``tiff``.
    """

    width: int
    height: int
    orientation: int
    decoder: str


def read_guide_header(path: Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> GuideHeader:
    """Check everything about a guide that can be known without decoding it.

    Raises:
        InputError: If the file is missing, no picture, damaged or too large.
    """
    start = read_start(path)
    with decoding(path, "JPEG, PNG, TIFF or WebP"):
        if start.startswith(TIFF_MAGICS):
            # Pillow cannot open every 16-bit TIFF, so the header is read by the one who will decode it.
            with tiff_page(path) as page:
                tag = page.tags.get(_ORIENTATION)
                orientation = int(tag.value) if tag is not None else 1
                size = (int(page.imagewidth), int(page.imagelength))
                decoder = "tiff" if page.dtype == np.uint16 else "pillow"
        elif start.startswith(PNG_MAGIC):
            # Not by Pillow: looking for EXIF, it would decode the picture before its size is checked.
            decoder = "png" if start[24] == 16 else "pillow"
            size = struct.unpack(">II", start[16:24])
            orientation = _png_orientation(path)
        else:
            with _pillow(path) as picture:
                size, decoder = picture.size, "pillow"
                orientation = int(picture.getexif().get(_ORIENTATION, 1))
    orientation = orientation if 1 <= orientation <= 8 else 1
    check_pixels(path, *size, max_pixels)
    width, height = size[::-1] if orientation >= 5 else size
    return GuideHeader(width, height, orientation, decoder)


def read_guide(path: Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Read a guide picture, upright, as (H, W, 3) RGB of 8 or 16 bits.

    Grey is repeated, alpha dropped, palettes and CMYK converted, EXIF orientation applied.

    Args:
        path: JPEG, PNG, TIFF or WebP file.
        max_pixels: Largest number of pixels allowed, checked before decoding.

    Raises:
        InputError: If the file cannot be used.
    """
    header = read_guide_header(path, max_pixels=max_pixels)
    with decoding(path, "picture"):
        if header.decoder == "pillow":
            return _read_8bit_guide(path, header.orientation)
        if header.decoder == "png":
            image = png_read(path)
        else:
            with tiff_page(path) as page:
                image = page.asarray()
                if image.ndim == 3 and page.planarconfig == 2:
                    image = np.moveaxis(image, 0, -1)
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim != 3 or image.shape[-1] not in (1, 2, 3, 4):
            raise InputError(f"{path}: a guide must have 1 to 4 channels; got shape {image.shape}", "save it as PNG")
        image = image[..., :1].repeat(3, axis=-1) if image.shape[-1] <= 2 else image[..., :3]
        return np.ascontiguousarray(_upright(image, header.orientation))


def _png_orientation(path: Path) -> int:
    from PIL import Image

    data = check_png(path)
    found = data.find(b"eXIf", 0, data.find(b"IDAT"))
    if found < 0:
        return 1
    exif = Image.Exif()
    exif.load(data[found + 4 : found + 4 + int.from_bytes(data[found - 4 : found], "big")])
    return int(exif.get(_ORIENTATION, 1))


def _read_8bit_guide(path: Path, orientation: int) -> NDArray[np.uint8]:
    with _pillow(path) as picture:
        if picture.mode in ("F", "I") or picture.mode.startswith("I;"):
            raise InputError(
                f"{path}: a guide must have 8 or 16 bits per channel; got Pillow mode {picture.mode!r}",
                "is this the depth file? save the guide as PNG or JPEG",
            )
        image = np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
        # Pillow turns TIFF pictures by itself, and only these.
        return image if picture.format == "TIFF" else np.ascontiguousarray(_upright(image, orientation))


def _upright(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    # EXIF: 5 to 8 are transposed; then rows, columns or both run backwards.
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image


@contextmanager
def _pillow(path: Path) -> Iterator[Any]:
    from PIL import Image, UnidentifiedImageError

    # Pillow's own limit is lower than ours and only warns; ours is checked right after the header.
    with _PILLOW_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            picture = Image.open(path, formats=GUIDE_FORMATS)
        except UnidentifiedImageError:
            raise InputError(
                f"{path}: a guide must be a JPEG, PNG, TIFF or WebP picture; its content is none of them",
                "are depth and guide swapped? otherwise save the guide as PNG or JPEG",
            ) from None
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with picture:
        yield picture
