"""TIFF: one layer of integers or floats; GDAL's nodata tag is understood."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddfup.errors import InputError
from ddfup.formats.base import AGAIN, COLOUR_HINT, NUMBERS, Format, Header
from ddfup.formats.orientation import ORIENTATION_TAG, UPRIGHT, known_orientation, upright_size

TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_GDAL_NODATA = 42113
# How the pixels are laid out; size and type are known from the header.
_LAYOUT = frozenset(
    {
        *("ImageWidth", "ImageLength", "BitsPerSample", "SamplesPerPixel", "SampleFormat", "PhotometricInterpretation"),
        *("PlanarConfiguration", "FillOrder", "RowsPerStrip", "StripOffsets", "StripByteCounts"),
        *("TileWidth", "TileLength", "TileOffsets", "TileByteCounts", "ResolutionUnit", "NewSubfileType"),
    }
)


@contextmanager
def tiff_page(path: Path) -> Iterator[Any]:
    """Open the first page of a TIFF file."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs odd tags to stderr
    size = path.stat().st_size
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        # The library would make room for what a strip says it has before it reads it.
        most = max(page.databytecounts, default=0)
        if most > size:
            raise InputError(
                f"{path}: must be a whole TIFF file; a part of it has {most} bytes, the file {size}",
                AGAIN,
            )
        yield page


def _header(path: Path) -> Header:
    with tiff_page(path) as page:
        if page.samplesperpixel != 1 or page.photometric == 3:
            kind = "a palette" if page.photometric == 3 else f"{page.samplesperpixel} channels"
            raise InputError(f"{path}: depth must have one channel; got {kind}", COLOUR_HINT)
        if page.dtype is None or page.imagedepth != 1:
            raise InputError(
                f"{path}: depth must be one layer of integers or floats; got {page.bitspersample} bits",
                "save the depth as float32 metres or uint16 millimetres",
            )
        width, height = int(page.imagewidth), int(page.imagelength)
        # A tile may be far larger than the picture: decoders would allocate it.
        if page.is_tiled and page.tilewidth * page.tilelength > max(16 * width * height, 1 << 22):
            raise InputError(
                f"{path}: tiles must be near the picture's size; got {page.tilewidth}x{page.tilelength}",
                "save it without tiles",
            )
        dtype, orientation = np.dtype(page.dtype), tiff_orientation(page)
        return Header(*upright_size(width, height, orientation), dtype, _nodata(page, dtype), orientation)


def tiff_orientation(page: Any) -> int:
    """Return the orientation of a TIFF page."""
    tag = page.tags.get(ORIENTATION_TAG)
    return UPRIGHT if tag is None else known_orientation(tag.value)


def _nodata(page: Any, dtype: np.dtype[Any]) -> float | None:
    """Read GDAL's tag, a number in letters; tifffile's own reading refuses what is a hair beyond the type."""
    if _GDAL_NODATA not in page.tags:
        return None
    try:
        value = float(str(page.tags[_GDAL_NODATA].value).strip().rstrip("\0"))
    except ValueError:
        return None
    if dtype.kind == "f" and math.isfinite(value):
        # GDAL rounds the largest float32, its usual mark, up to 3.40282346638529e+38.
        most = float(np.finfo(dtype).max)
        value = min(max(value, -most), most)
    return value


def _read(path: Path) -> NDArray[Any]:
    with tiff_page(path) as page:
        array: NDArray[Any] = page.asarray(maxworkers=1)
    return array


def _notes(path: Path) -> dict[str, str]:
    with tiff_page(path) as page:
        notes = {}
        for tag in page.tags:
            if tag.name in _LAYOUT:
                continue
            if tag.count <= 10_000 and isinstance(tag.value, str | int | float) and not isinstance(tag.value, bool):
                notes[str(tag.name)] = str(getattr(tag.value, "name", tag.value))
    try:
        ours = json.loads(notes["ImageDescription"])
    except (KeyError, ValueError, RecursionError):
        return notes
    if isinstance(ours, dict) and all(str(key).startswith("ddfup:") for key in ours):
        del notes["ImageDescription"]
        notes |= {str(key): str(value) for key, value in ours.items()}
    return notes


def _encode(array: NDArray[Any], notes: Mapping[str, str]) -> bytes:
    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        array.astype(array.dtype.newbyteorder("=")),
        compression="zlib",
        predictor=array.dtype.kind == "f" or array.dtype.itemsize <= 4,  # it has none for 64-bit integers
        photometric="minisblack",
        description=json.dumps({f"ddfup:{key}": text for key, text in notes.items()}),
        metadata=None,
        software="ddfup",
    )
    return buffer.getvalue()


TIFF = Format("tiff", (".tif", ".tiff"), TIFF_MAGICS, NUMBERS, _header, _read, _notes, _encode)
