"""Depth file formats: one row of FORMATS each (read the header, decode, encode), and what all readers check.

Not for use from outside: `ddfup.io` is the door.
"""

from __future__ import annotations

import io
import json
import logging
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddfup.errors import InputError

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
DEFAULT_MAX_PIXELS = 200_000_000
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True)
class Header:
    """What a depth file's header says.

    Attributes:
        width: Columns.
        height: Rows.
        dtype: Stored type, with its byte order.
        nodata: One more value that means "no measurement" (GDAL's tag), or None.
    """

    width: int
    height: int
    dtype: np.dtype[Any]
    nodata: float | None = None


@dataclass(frozen=True)
class Format:
    """One row of `FORMATS`.

    Attributes:
        name: Value of ``--format``.
        suffixes: File suffixes, lower case; the first is used for outputs.
        magics: What such a file begins with.
        dtypes: Types that can be stored, as kind and size in bytes.
        read_header: Reads size and type without decoding; refuses what is not depth.
        read: Decodes to (H, W).
        encode: (H, W) array and notes (key, text) to the bytes of a file.
    """

    name: str
    suffixes: tuple[str, ...]
    magics: tuple[bytes, ...]
    dtypes: frozenset[str]
    read_header: Callable[[Path], Header]
    read: Callable[[Path], NDArray[Any]]
    encode: Callable[[NDArray[Any], Mapping[str, str]], bytes]


# --- what all readers share ---


def read_start(path: Path) -> bytes:
    """Return the first 64 bytes of a file, refusing what is no readable, non-empty file."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: must be a file; got a {'folder' if path.is_dir() else 'device or pipe'}")
        with path.open("rb") as stream:
            start = stream.read(64)
    except FileNotFoundError as error:
        raise InputError(f"{path}: must exist; there is no such file", "check the path") from error
    except OSError as error:
        raise InputError(f"{path}: must be readable; got {error.strerror or error}", "check the path") from error
    except ValueError as error:
        raise InputError(f"{str(path)!r}: must be a path; got {error}", "check the path") from error
    if not start:
        raise InputError(f"{path}: must not be empty; got 0 bytes", "save or download the file again")
    return start


@contextmanager
def decoding(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a decoder raises (over 15 kinds of exception) into one InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoders warn of odd metadata; what matters is the pixels
            yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path}: must be a whole {kind} file; got {reason[:200]}", "save or download the file again"
        ) from error


def check_pixels(path: Path, width: int, height: int, max_pixels: int) -> None:
    """Refuse a size of nothing, or of more than ``max_pixels``."""
    if width < 1 or height < 1:
        raise InputError(f"{path}: must have at least one pixel; got {width}x{height}")
    if width * height > max_pixels:
        raise InputError(
            f"{path}: must have at most {max_pixels} pixels; got {width}x{height} = {width * height}",
            "if the file is right, raise --max-pixels",
        )


# --- PNG ---

COLOUR_HINT = "pictures of depth (colour maps, viewer snapshots) hold no depth; export the raw 16-bit or float values"


def _png_header(path: Path) -> Header:
    with path.open("rb") as stream:
        start = stream.read(26)
    width, height, bits, colour = struct.unpack(">IIBB", start[16:26])
    if colour != 0:
        kinds = {2: "3 channels (RGB)", 3: "a palette", 4: "grey with alpha", 6: "4 channels (RGBA)"}
        raise InputError(
            f"{path}: depth must have one channel; got {kinds.get(colour, f'colour type {colour}')}",
            COLOUR_HINT,
        )
    if bits not in (8, 16):
        raise InputError(f"{path}: depth must have 16 bits per pixel; got {bits}", COLOUR_HINT)
    return Header(width, height, np.dtype(np.uint8 if bits == 8 else np.uint16))


def check_png(path: Path) -> bytes:
    """Return the file's bytes after checking every chunk: decoders let cut ends and flipped bits pass."""
    data = path.read_bytes()
    view = memoryview(data)
    position = len(PNG_MAGIC)
    while True:
        head = bytes(view[position : position + 8])
        if len(head) < 8:
            raise InputError(f"{path}: must be a whole PNG file; it ends early", "save or download the file again")
        (length,), kind = struct.unpack(">I", head[:4]), head[4:]
        body = view[position + 4 : position + 8 + length]
        check = view[position + 8 + length : position + 12 + length]
        if len(body) < 4 + length or len(check) < 4 or zlib.crc32(body) != int.from_bytes(check, "big"):
            name = kind.decode("ascii", "replace")
            raise InputError(
                f"{path}: must be a whole PNG file; its {name!r} part at byte {position} is cut or damaged",
                "save or download the file again",
            )
        position += 12 + length
        if kind == b"IEND":
            return data


def png_read(path: Path) -> NDArray[Any]:
    """Decode a PNG file as it is stored, 16 bits included."""
    import imagecodecs

    image: NDArray[Any] = imagecodecs.png_decode(check_png(path))
    return image


def _png_encode(array: NDArray[Any], notes: Mapping[str, str]) -> bytes:
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for key, text in notes.items():
        info.add_text(f"ddfup:{key}", text)
    buffer = io.BytesIO()
    # Level 1 is six times as fast as the default at 1920x1440 and a few percent larger.
    Image.fromarray(array.astype(array.dtype.newbyteorder("="))).save(buffer, "PNG", compress_level=1, pnginfo=info)
    return buffer.getvalue()


# --- NPY ---


def _npy_header(path: Path) -> Header:
    with path.open("rb") as stream:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise InputError(f"{path}: NPY must be version 1.0 or 2.0; got {version}", "save plain numbers with numpy")
        shape, _, dtype = readers[version](stream)
        offset = stream.tell()
    if len(shape) != 2:
        raise InputError(
            f"{path}: depth must have 2 dimensions (rows, columns); got shape {shape}",
            "save one map: depth[..., 0]",
        )
    if dtype.hasobject:
        raise InputError(f"{path}: depth must be plain numbers; got {dtype} (pickled objects are never loaded)")
    size = path.stat().st_size
    needed = offset + shape[0] * shape[1] * dtype.itemsize
    if size < needed:
        raise InputError(f"{path}: must be a whole NPY file of {needed} bytes; got {size}", "save it again")
    return Header(int(shape[1]), int(shape[0]), dtype)


def _npy_read(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, allow_pickle=False)
    return array


def _npy_encode(array: NDArray[Any], notes: Mapping[str, str]) -> bytes:
    del notes  # the format has no room for them
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


# --- TIFF ---


@contextmanager
def tiff_page(path: Path) -> Iterator[Any]:
    """Open the first page of a TIFF file."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs odd tags to stderr
    with tifffile.TiffFile(path) as tiff:
        yield tiff.pages.first


def _tiff_header(path: Path) -> Header:
    with tiff_page(path) as page:
        if page.samplesperpixel != 1 or page.photometric == 3:
            kind = "a palette" if page.photometric == 3 else f"{page.samplesperpixel} channels"
            raise InputError(f"{path}: depth must have one channel; got {kind}", COLOUR_HINT)
        if page.dtype is None or page.imagedepth != 1:
            raise InputError(f"{path}: depth must be one layer of integers or floats; got {page.bitspersample} bits")
        width, height = int(page.imagewidth), int(page.imagelength)
        # A tile may be far larger than the picture: decoders would allocate it.
        if page.is_tiled and page.tilewidth * page.tilelength > max(16 * width * height, 1 << 22):
            raise InputError(f"{path}: tiles must be near the picture's size; got {page.tilewidth}x{page.tilelength}")
        nodata = float(page.nodata) if 42113 in page.tags else None
        return Header(width, height, np.dtype(page.dtype), nodata)


def _tiff_read(path: Path) -> NDArray[Any]:
    with tiff_page(path) as page:
        array: NDArray[Any] = page.asarray(maxworkers=1)
    return array


def _tiff_encode(array: NDArray[Any], notes: Mapping[str, str]) -> bytes:
    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        array.astype(array.dtype.newbyteorder("=")),
        compression="zlib",
        predictor=True,
        photometric="minisblack",
        description=json.dumps({f"ddfup:{key}": text for key, text in notes.items()}),
        metadata=None,
        software="ddfup",
    )
    return buffer.getvalue()


# --- the table ---

NUMBERS = frozenset({"u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"})

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("png", (".png",), (PNG_MAGIC,), frozenset({"u1", "u2"}), _png_header, png_read, _png_encode),
        Format("tiff", (".tif", ".tiff"), TIFF_MAGICS, NUMBERS, _tiff_header, _tiff_read, _tiff_encode),
        Format("npy", (".npy",), (b"\x93NUMPY",), NUMBERS, _npy_header, _npy_read, _npy_encode),
    )
}
