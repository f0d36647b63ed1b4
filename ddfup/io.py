"""Files and units: depth maps in and out, guides in; writing them is for :mod:`ddfup.writing`.

The door to what lies behind it: `ddfup.units` knows what a stored number means in metres, `ddfup.formats` and
`ddfup.guides` know suffixes, file headers and decoders.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddfup.errors import ArgumentError, InputError, PairingError
from ddfup.formats import FORMATS
from ddfup.formats.base import (
    AGAIN,
    COLOUR_HINT,
    DEFAULT_MAX_PIXELS,
    NUMBERS,
    Format,
    Header,
    check_pixels,
    check_ratio,
    decoding,
    read_start,
)
from ddfup.formats.orientation import upright
from ddfup.formats.raw import RAW_TYPES, Raw, raw_format
from ddfup.guides import GuideHeader, read_guide, read_guide_header
from ddfup.sizes import check_sizes
from ddfup.units import UNITS, Unit, check_range, dequantise, limits, parse_invalid, parse_unit, quantise

__all__ = [
    "DEFAULT_INVALID",
    "DEFAULT_MAX_PIXELS",
    "DEFAULT_MIN_CONFIDENCE",
    "FORMATS",
    "UNITS",
    "DepthMap",
    "Format",
    "GuideHeader",
    "Header",
    "Raw",
    "Unit",
    "check_confidence",
    "check_pair",
    "check_range",
    "encode_depth",
    "files_by_stem",
    "format_of",
    "limits",
    "parse_invalid",
    "parse_size",
    "parse_unit",
    "read_confidence",
    "read_depth",
    "read_depth_header",
    "read_guide",
    "read_guide_header",
    "read_notes",
    "read_stored",
    "storage",
]

DEFAULT_INVALID = (0.0, math.nan, math.inf)
# What people take for depth although it is a picture of it; the suffixes of depth formats are not among them.
_PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".heic", ".heif"})
# Confidence of ARKit and Record3D: 0 low, 1 medium, 2 high.
DEFAULT_MIN_CONFIDENCE = 1


@dataclass(frozen=True)
class DepthMap:
    """A depth map in memory, with what is needed to write another one like it.

    Attributes:
        depth: (H, W) float32, metres (stored values for disparity); NaN where not valid.
        valid: (H, W) bool.
        unit: Unit of the file.
        dtype: Type in the file.
        path: The file.
        format: Its row of `FORMATS`.
    """

    depth: NDArray[np.float32]
    valid: NDArray[np.bool_]
    unit: Unit
    dtype: np.dtype[Any]
    path: Path
    format: Format


def format_of(path: PurePath) -> Format | None:
    """Return the row of `FORMATS` for a path's suffix, or None."""
    suffix = path.suffix.lower()
    return next((row for row in FORMATS.values() if suffix in row.suffixes), None)


def files_by_stem(folder: Path) -> dict[str, Path]:
    """Return a folder's files by their stems, in sorted order, hidden ones (.DS_Store) left out.

    Args:
        folder: May be missing: then there are none.

    Raises:
        PairingError: If two files have one stem.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.stem in files:
            raise PairingError(
                f"{path}: stems must be unique; {files[path.stem].name} has the same",
                "a data set is a folder with rgb/ and depth/ of equal stems",
            )
        files[path.stem] = path
    return files


def parse_size(text: str) -> Raw:
    """Return (width, height) of text such as ``256x192``, and the type of ``640x480:u16``.

    Raises:
        ArgumentError: If it is none.
    """
    sides = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})(?::([a-z0-9]+))?", text.strip().lower())
    if sides is None:
        raise ArgumentError(f"a raw file's size must be WIDTHxHEIGHT; got {text!r}", "example: --raw 256x192")
    if sides[3] is None:
        return int(sides[1]), int(sides[2])
    if sides[3] not in RAW_TYPES:
        raise ArgumentError(f"a raw file's type must be one of {', '.join(RAW_TYPES)}; got {sides[3]!r}")
    return int(sides[1]), int(sides[2]), sides[3]


def read_depth_header(
    path: Path,
    *,
    unit: Unit | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    raw: Raw | None = None,
) -> tuple[Format, Header]:
    """Check everything about a depth file that can be known without decoding it.

    Args:
        path: The file.
        unit: Unit the user gave, if any; 8-bit files need one.
        max_pixels: Largest number of pixels allowed.
        raw: (width, height) of files without a header, with their type (`RAW_TYPES`) if it does not follow from
            the bytes per pixel; files with a known suffix are read as ever.

    Raises:
        InputError: If the file is missing, of another kind, damaged, too large, or not a depth map.
    """
    row = format_of(path)
    start = read_start(path)
    if row is None and raw is not None:
        check_pixels(path, raw[0], raw[1], max_pixels)
        row = raw_format(*raw)
    if row is None:
        raise _unknown_suffix(path, start)
    if not start.startswith(row.magics):
        actual = _format_by_content(start)
        raise InputError(
            f"{path}: is not {row.name.upper()} by its content"
            + (f" but {actual.upper()}" if actual else f"; it begins with {start[:8]!r}"),
            f"rename it to {path.stem}{FORMATS[actual].suffixes[0]}" if actual else "save or download the file again",
        )
    with decoding(path, row.name.upper()):
        header = row.read_header(path)
    check_pixels(path, header.width, header.height, max_pixels)
    check_ratio(path, header.width * header.height * header.dtype.itemsize, path.stat().st_size)
    code = f"{header.dtype.kind}{header.dtype.itemsize}"
    if code not in NUMBERS:
        raise InputError(
            f"{path}: depth values must be integers or floats of up to 64 bits; got {header.dtype}",
            "save the depth as float32 metres or uint16 millimetres",
        )
    if header.dtype.itemsize == 1 and unit is None:
        raise InputError(
            f"{path}: 8-bit depth has no usual unit; got {header.dtype} values",
            "if it is no colour map, say what the numbers mean: --unit disparity, or units per metre",
        )
    if unit is not None and unit.coding and code != "u2":
        raise InputError(
            f"{path}: unit {unit.name} is for unsigned 16-bit values; got {header.dtype}",
            "leave --unit out, or give mm or m",
        )
    return row, header


def read_depth(
    path: Path,
    *,
    unit: Unit | None = None,
    invalid: Sequence[float] = DEFAULT_INVALID,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    confidence: Path | None = None,
    min_confidence: int = DEFAULT_MIN_CONFIDENCE,
    raw: Raw | None = None,
) -> DepthMap:
    """Read a depth map.

    Args:
        path: File of one of `FORMATS` with one channel.
        unit: Meaning of the stored numbers; by default integers are millimetres and floats metres.
        invalid: Stored values that mean "no measurement". NaN and infinities always do, and depths that are not
            above 0.
        max_pixels: Largest number of pixels allowed, checked before decoding.
        confidence: Confidence map of the same size, or None; see `read_confidence`.
        min_confidence: Pixels of less confidence have no measurement.
        raw: (width, height) of files without a header; see `read_depth_header`.

    Raises:
        InputError: If a file cannot be used, or no pixel is valid.
    """
    row, header = read_depth_header(path, unit=unit, max_pixels=max_pixels, raw=raw)
    stored = _decode(path, row, header)
    unit = unit or UNITS["m" if header.dtype.kind == "f" else "mm"]
    valid: NDArray[np.bool_] = np.isfinite(stored)
    if unit.per_metre is not None:
        valid &= stored > 0
    if confidence is not None:
        valid &= read_confidence(confidence, header, max_pixels=max_pixels, raw=raw) >= min_confidence
    with np.errstate(over="ignore", invalid="ignore"):  # damaged floats may be signalling NaN
        for value in (*invalid, *([] if header.nodata is None else [header.nodata])):
            if math.isfinite(value):
                valid &= stored != value
    depth = dequantise(stored, unit)
    if unit.coding:
        valid &= np.isfinite(depth)
    if not valid.any():
        marks = ", ".join(f"{value:g}" for value in invalid if value or unit.per_metre is None)
        raise InputError(
            f"{path}: has no valid pixel: all {stored.size} values mean no measurement ({marks or 'nan'}, not above 0"
            + (")" if confidence is None else f", or confidence below {min_confidence})"),
            "check that this is the depth file, and --invalid",
        )
    if not np.isfinite(depth[valid]).all():
        raise InputError(f"{path}: depth must fit float32; got {float(stored[valid].max()):g}", "check --unit")
    depth[~valid] = np.nan
    return DepthMap(depth, valid, unit, header.dtype, path, row)


def read_stored(
    path: Path, *, max_pixels: int = DEFAULT_MAX_PIXELS, raw: Raw | None = None
) -> tuple[Format, Header, NDArray[Any]]:
    """Read the numbers of a depth file as they are stored, whatever they mean.

    Args:
        path: The file.
        max_pixels: Largest number of pixels allowed, checked before decoding.
        raw: (width, height) of files without a header; see `read_depth_header`.

    Raises:
        InputError: If the file cannot be used.
    """
    row, header = read_depth_header(path, unit=UNITS["disparity"], max_pixels=max_pixels, raw=raw)
    return row, header, _decode(path, row, header)


def _decode(path: Path, row: Format, header: Header) -> NDArray[Any]:
    with decoding(path, row.name.upper()):
        raw = upright(row.read(path), header.orientation)
    if raw.shape != (header.height, header.width):
        raise InputError(
            f"{path}: must decode to its header's {header.width}x{header.height}; got shape {raw.shape}", AGAIN
        )
    return raw


def check_confidence(
    path: Path, depth: Header, *, max_pixels: int = DEFAULT_MAX_PIXELS, raw: Raw | None = None
) -> tuple[Format, Header]:
    """Check everything about a confidence map that can be known without decoding it; see `read_confidence`.

    Raises:
        InputError: If the file cannot be used, has another size, or no integers.
    """
    # A type that was named is the depth's.
    size = None if raw is None else (raw[0], raw[1])
    row, header = read_depth_header(path, unit=UNITS["disparity"], max_pixels=max_pixels, raw=size)
    if (header.width, header.height) != (depth.width, depth.height):
        raise InputError(
            f"{path}: confidence must have the size of its depth = {depth.width}x{depth.height}; "
            f"got {header.width}x{header.height}",
            "is this the confidence file of this depth?",
        )
    if header.dtype.kind not in "ui":
        raise InputError(
            f"{path}: confidence must be integers 0, 1 and 2; got {header.dtype}", "is this the confidence file?"
        )
    return row, header


def read_confidence(
    path: Path, depth: Header, *, max_pixels: int = DEFAULT_MAX_PIXELS, raw: Raw | None = None
) -> NDArray[np.integer[Any]]:
    """Read the confidence map of a depth map: 0 low, 1 medium, 2 high (ARKit, Record3D).

    Args:
        path: File of one of `FORMATS`, usually 8-bit PNG.
        depth: Header of the depth map.
        max_pixels: Largest number of pixels allowed, checked before decoding.
        raw: (width, height) of files without a header; see `read_depth_header`.

    Raises:
        InputError: If the file cannot be used, has another size, or values other than 0, 1 and 2.
    """
    marks = _decode(path, *check_confidence(path, depth, max_pixels=max_pixels, raw=raw))
    if marks.max() > 2 or marks.min() < 0:
        raise InputError(
            f"{path}: confidence must be 0, 1 or 2; got {marks.min()} to {marks.max()}", "is this the confidence file?"
        )
    return marks


def read_notes(path: Path) -> dict[str, str]:
    """Return the texts that a depth file holds beside its pixels; those that ddfup wrote begin with ``ddfup:``.

    Raises:
        InputError: If the file is no depth file, or damaged.
    """
    row = format_of(path)
    if row is None:
        raise _unknown_suffix(path, read_start(path))
    with decoding(path, row.name.upper()):
        return row.read_notes(path)


def _format_by_content(start: bytes) -> str | None:
    return next((row.name for row in FORMATS.values() if start.startswith(row.magics)), None)


def _unknown_suffix(path: Path, start: bytes) -> InputError:
    actual = _format_by_content(start)
    if actual is not None:
        hint = f"by its content it is {actual.upper()}: rename it to {path.stem}{FORMATS[actual].suffixes[0]}"
    elif path.suffix.lower() in _PICTURE_SUFFIXES:
        hint = COLOUR_HINT
    else:
        hint = "if it holds numbers without a header, say its size: --raw 256x192"
    return InputError(f"{path}: depth must be one of {_suffixes()}; got {path.suffix or 'no suffix'!r}", hint)


def _suffixes() -> str:
    return ", ".join(suffix for row in FORMATS.values() for suffix in row.suffixes)


def check_pair(depth: Path, depth_size: tuple[int, int], guide: Path, guide_size: tuple[int, int]) -> None:
    """Refuse two files that cannot show the same view; the rule is that of :mod:`ddfup.sizes`.

    Args:
        depth: Depth file, for the message.
        depth_size: Its (width, height).
        guide: Guide file, for the message.
        guide_size: Its (width, height), upright.

    Raises:
        InputError: If the depth is larger than the guide or the aspect ratios do not agree.
    """
    check_sizes(depth_size, guide_size, depth=f"depth {depth}", guide=f"guide {guide}")


def storage(source: DepthMap, target: Format) -> tuple[np.dtype[Any], Unit]:
    """Return type and unit in which a result goes into ``target``: the source's own, if the format has it.

    PNG has no floats: metres become 16-bit millimetres, other units stay. EXR and PFM have nothing but float32:
    integers become metres, or stay disparity.

    Raises:
        InputError: If values would lose their meaning (float disparity in a PNG).
    """
    dtype, unit = source.dtype, source.unit
    if f"{dtype.kind}{dtype.itemsize}" in target.dtypes:
        return dtype, unit
    if "f4" in target.dtypes:
        whole = dtype.kind != "f" and unit.per_metre is not None
        return np.dtype(np.float32), UNITS["m"] if whole else unit
    if dtype.kind == "f":
        if unit.per_metre is None:
            raise InputError(
                f"{source.path}: disparity in {dtype} must not be rounded to the integers of {target.name}",
                "use --format exr, tiff or npy",
            )
        unit = UNITS["mm"] if unit.per_metre == 1 else unit
    return np.dtype(np.uint16), unit


def encode_depth(
    depth: NDArray[np.floating[Any]],
    *,
    dtype: np.dtype[Any],
    unit: Unit,
    target: Format,
    notes: Mapping[str, str] | None = None,
    zero_is_valid: bool = False,
) -> bytes:
    """Return the bytes of a depth file.

    Integers are rounded and mark invalid pixels with 0, floats with NaN. A valid value between 0 and the
    smallest of `limits` becomes that smallest one, so that it does not read as invalid.

    Args:
        depth: (H, W) metres or disparity; not finite = invalid.
        dtype: Type to store, one of the format's.
        unit: Unit to store.
        target: Row of `FORMATS`.
        notes: Texts for the file's metadata (formats that have any).
        zero_is_valid: Of disparity without invalid pixels: 0 is a value like any other, and stays 0.

    Raises:
        InputError: If a value is beyond what ``dtype`` holds; nothing is ever wrapped.
    """
    stored = quantise(depth, dtype, unit, zero_is_valid=zero_is_valid)
    texts = {"unit": unit.name, **(notes or {})}
    if unit.per_metre is not None and unit.coding != "kinect":
        texts["units_per_metre"] = f"{unit.per_metre:.12g}"
    return target.encode(stored, texts)
