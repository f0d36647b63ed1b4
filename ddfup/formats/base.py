"""What the rows of FORMATS are made of, and the checks that all readers share."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddfup._shared import SharedContext
from ddfup.errors import InputError
from ddfup.formats.orientation import UPRIGHT

DEFAULT_MAX_PIXELS = 200_000_000
AGAIN = "save or download the file again"
COLOUR_HINT = "pictures of depth (colour maps, viewer snapshots) hold no depth; export the raw 16-bit or float values"
# Depth and pictures shrink by 2 to 20, smooth or masked ones by more; what is large beyond this is made to fill memory.
_LARGE_BYTES = 64 << 20
_LARGEST_RATIO = 300
# Types as kind and size in bytes; those of a format are what it can store.
INTEGERS = frozenset({"u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"})
NUMBERS = INTEGERS | {"f2", "f4", "f8"}


@dataclass(frozen=True)
class Header:
    """What a depth file's header says.

    Attributes:
        width: Columns of the upright map.
        height: Rows of the upright map.
        dtype: Stored type, with its byte order.
        nodata: One more value that means "no measurement" (GDAL's tag, a renderer's background), or None.
        orientation: How the map is stored, 1 to 8 as in EXIF.
    """

    width: int
    height: int
    dtype: np.dtype[Any]
    nodata: float | None = None
    orientation: int = UPRIGHT


@dataclass(frozen=True)
class Format:
    """One row of `FORMATS`.

    Attributes:
        name: Value of ``--format``.
        suffixes: File suffixes, lower case; the first is used for outputs.
        magics: What such a file begins with.
        dtypes: Types that can be stored, as kind and size in bytes.
        read_header: Reads size and type without decoding; refuses what is not depth.
        read: Decodes to (H, W), not yet turned upright.
        read_notes: Reads the texts beside the pixels, ours and those of others; long ones may be cut.
        encode: (H, W) array and notes (key, text) to the bytes of a file.
    """

    name: str
    suffixes: tuple[str, ...]
    magics: tuple[bytes, ...]
    dtypes: frozenset[str]
    read_header: Callable[[Path], Header]
    read: Callable[[Path], NDArray[Any]]
    read_notes: Callable[[Path], dict[str, str]]
    encode: Callable[[NDArray[Any], Mapping[str, str]], bytes]


def read_start(path: Path) -> bytes:
    """Return the first 64 bytes of a file, refusing what is no readable, non-empty file."""
    try:
        if path.exists() and not path.is_file():
            what = ("folder", "check the path") if path.is_dir() else ("device or pipe", "save it to a file first")
            raise InputError(f"{path}: must be a file; got a {what[0]}", what[1])
        with path.open("rb") as stream:
            start = stream.read(64)
    except FileNotFoundError as error:
        raise InputError(f"{path}: must exist; there is no such file", "check the path") from error
    except OSError as error:
        raise InputError(f"{path}: must be readable; got {error.strerror or error}", "check the path") from error
    except ValueError as error:
        raise InputError(f"{str(path)!r}: must be a path; got {error}", "check the path") from error
    if not start:
        raise InputError(f"{path}: must not be empty; got 0 bytes", AGAIN)
    return start


@contextmanager
def _ignoring() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Decoders warn of odd metadata; what matters is the pixels.
_without_warnings = SharedContext(_ignoring)


@contextmanager
def decoding(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a decoder raises (over 15 kinds of exception) into one InputError.

    Lack of memory stays what it is: it says nothing about the file.
    """
    try:
        with _without_warnings:
            yield
    except (InputError, MemoryError):
        raise
    except OSError as error:
        if error.errno is None:
            raise _damaged(path, kind, error) from error
        raise InputError(f"{path}: must be readable; got {error.strerror or error}", "check the path") from error
    except Exception as error:
        raise _damaged(path, kind, error) from error


def _damaged(path: Path, kind: str, error: Exception) -> InputError:
    # What Python says of a missing byte or key is about the reader, not about the file.
    own = isinstance(error, LookupError | struct.error)
    reason = "" if own else (str(error).strip() or type(error).__name__).splitlines()[0]
    detail = f" ({reason[:200]})" if reason else ""
    return InputError(f"{path}: must be a whole {kind} file; it is cut or damaged{detail}", AGAIN)


def check_pixels(path: Path, width: int, height: int, max_pixels: int) -> None:
    """Refuse a size of nothing, or of more than ``max_pixels``."""
    if width < 1 or height < 1:
        raise InputError(f"{path}: must have at least one pixel; got {width}x{height}", AGAIN)
    if width * height > max_pixels:
        raise InputError(
            f"{path}: must have at most {max_pixels} pixels; got {width}x{height} = {width * height}",
            "if the file is right, raise --max-pixels",
        )


def check_ratio(path: Path, needed: int, stored: int) -> None:
    """Refuse contents that are large and have shrunk far more than depth and pictures do.

    Args:
        path: The file, for the message.
        needed: Bytes of the decoded pixels.
        stored: Bytes that they take in the file.
    """
    if needed > max(_LARGE_BYTES, _LARGEST_RATIO * stored):
        raise InputError(
            f"{path}: {needed} bytes of pixels must not shrink more than {_LARGEST_RATIO}:1; got {stored} bytes",
            "if the file is right, save it with less compression",
        )


def no_notes(path: Path) -> dict[str, str]:
    """Return nothing: the format has no room for texts."""
    del path
    return {}
