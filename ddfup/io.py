"""Files and units: depth maps in and out, guides in, atomic writing.

This module knows what a stored number means in metres; `ddfup.formats` and `ddfup.guides` behind it know
suffixes, file headers and decoders.
"""

from __future__ import annotations

import errno
import io
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddfup.errors import ArgumentError, InputError, OutputError
from ddfup.formats import (
    COLOUR_HINT,
    DEFAULT_MAX_PIXELS,
    FORMATS,
    NUMBERS,
    Format,
    Header,
    check_pixels,
    decoding,
    read_start,
)
from ddfup.guides import GuideHeader, read_guide, read_guide_header
from ddfup.sizes import check_sizes

__all__ = [
    "DEFAULT_INVALID",
    "DEFAULT_MAX_PIXELS",
    "FORMATS",
    "UNITS",
    "DepthMap",
    "Format",
    "GuideHeader",
    "Header",
    "Unit",
    "check_image_suffix",
    "check_pair",
    "check_range",
    "check_writable",
    "encode_depth",
    "encode_image",
    "format_of",
    "limits",
    "parse_invalid",
    "parse_unit",
    "read_depth",
    "read_depth_header",
    "read_guide",
    "read_guide_header",
    "storage",
    "write_files",
]

DEFAULT_INVALID = (0.0, math.nan, math.inf)


@dataclass(frozen=True)
class Unit:
    """What a stored number means.

    Attributes:
        name: As the user writes it: ``mm``, ``m``, ``disparity``, a preset, or units per metre.
        per_metre: Stored units in one metre; None for disparity, which is kept as it is.
    """

    name: str
    per_metre: float | None

    @property
    def factor(self) -> float:
        """Stored value of 1 (one metre, or one step of disparity)."""
        return 1.0 if self.per_metre is None else self.per_metre

    @property
    def label(self) -> str:
        """Unit of the values in memory: ``m``, or nothing for disparity."""
        return "" if self.per_metre is None else "m"


UNITS: dict[str, Unit] = {
    name: Unit(name, per_metre)
    for name, per_metre in {
        "mm": 1000.0,
        "m": 1.0,
        "disparity": None,
        "tum": 5000.0,
        "kitti": 256.0,
        "vkitti": 100.0,
        "scannet": 1000.0,
        "arkit": 1000.0,
        "realsense": 1000.0,
    }.items()
}


def parse_unit(text: str) -> Unit:
    """Return the unit for a name of `UNITS` or a number of units per metre such as ``5000``.

    Raises:
        ArgumentError: If the text is neither.
    """
    name = text.strip().lower()
    if name in UNITS:
        return UNITS[name]
    try:
        per_metre = float(name)
    except ValueError:
        per_metre = math.nan
    if not 1e-6 <= per_metre <= 1e9:
        raise ArgumentError(
            f"unit must be a name or a number of units per metre from 1e-6 to 1e9; got {text!r}",
            f"names: {', '.join(UNITS)}; for 0.25 mm steps give 4000",
        )
    return Unit(f"{per_metre:.12g}/m", per_metre)


def parse_invalid(text: str) -> tuple[float, ...]:
    """Return the stored values that mean "no measurement", from text such as ``0,65535``.

    Raises:
        ArgumentError: If a part is no number.
    """
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ArgumentError(
            f"invalid values must be numbers with commas between them; got {text!r}",
            "example: --invalid 0,65535",
        ) from None


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


def format_of(path: Path) -> Format | None:
    """Return the row of `FORMATS` for a path's suffix, or None."""
    suffix = path.suffix.lower()
    return next((row for row in FORMATS.values() if suffix in row.suffixes), None)


def read_depth_header(
    path: Path, *, unit: Unit | None = None, max_pixels: int = DEFAULT_MAX_PIXELS
) -> tuple[Format, Header]:
    """Check everything about a depth file that can be known without decoding it.

    Args:
        path: The file.
        unit: Unit the user gave, if any; 8-bit files need one.
        max_pixels: Largest number of pixels allowed.

    Raises:
        InputError: If the file is missing, of another kind, damaged, too large, or not a depth map.
    """
    row = format_of(path)
    start = read_start(path)
    if row is None:
        known = ", ".join(suffix for other in FORMATS.values() for suffix in other.suffixes)
        raise InputError(f"{path}: depth must be one of {known}; got {path.suffix or 'no suffix'!r}", COLOUR_HINT)
    if not start.startswith(row.magics):
        actual = next((other.name for other in FORMATS.values() if start.startswith(other.magics)), None)
        raise InputError(
            f"{path}: is not {row.name.upper()} by its content"
            + (f" but {actual.upper()}" if actual else f"; it begins with {start[:8]!r}"),
            f"rename it to {path.stem}{FORMATS[actual].suffixes[0]}" if actual else "save or download the file again",
        )
    with decoding(path, row.name.upper()):
        header = row.read_header(path)
    check_pixels(path, header.width, header.height, max_pixels)
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
    return row, header


def read_depth(
    path: Path,
    *,
    unit: Unit | None = None,
    invalid: Sequence[float] = DEFAULT_INVALID,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> DepthMap:
    """Read a depth map.

    Args:
        path: PNG, NPY or TIFF file with one channel.
        unit: Meaning of the stored numbers; by default integers are millimetres and floats metres.
        invalid: Stored values that mean "no measurement". NaN, infinities and negative depths always do.
        max_pixels: Largest number of pixels allowed, checked before decoding.

    Raises:
        InputError: If the file cannot be used, or has no valid pixel.
    """
    row, header = read_depth_header(path, unit=unit, max_pixels=max_pixels)
    with decoding(path, row.name.upper()):
        raw = row.read(path)
    if raw.shape != (header.height, header.width):
        raise InputError(
            f"{path}: must decode to its header's {header.width}x{header.height}; got shape {raw.shape}",
            "save or download the file again",
        )
    unit = unit or UNITS["m" if header.dtype.kind == "f" else "mm"]
    valid: NDArray[np.bool_] = np.isfinite(raw)
    if unit.per_metre is not None:
        valid &= raw >= 0
    with np.errstate(over="ignore"):
        for value in (*invalid, *([] if header.nodata is None else [header.nodata])):
            if math.isfinite(value):
                valid &= raw != value
        depth = (raw / np.float64(unit.factor)).astype(np.float32)
    if not valid.any():
        marks = ", ".join(f"{value:g}" for value in invalid)
        raise InputError(
            f"{path}: has no valid pixel: all {raw.size} values mean no measurement ({marks}, negative)",
            "check that this is the depth file, and --invalid",
        )
    if not np.isfinite(depth[valid]).all():
        raise InputError(f"{path}: depth must fit float32; got {float(raw[valid].max()):g}", "check --unit")
    depth[~valid] = np.nan
    return DepthMap(depth, valid, unit, header.dtype, path, row)


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

    PNG has no floats: metres become 16-bit millimetres, other units stay.

    Raises:
        InputError: If values would lose their meaning (float disparity in a PNG).
    """
    dtype, unit = source.dtype, source.unit
    if f"{dtype.kind}{dtype.itemsize}" in target.dtypes:
        return dtype, unit
    if dtype.kind == "f":
        if unit.per_metre is None:
            raise InputError(
                f"{source.path}: disparity in {dtype} must not be rounded to the integers of {target.name}",
                "use --format tiff or --format npy",
            )
        unit = UNITS["mm"] if unit.per_metre == 1 else unit
    return np.dtype(np.uint16), unit


def limits(dtype: np.dtype[Any], unit: Unit) -> tuple[float, float]:
    """Return the smallest and largest valid depth (metres or disparity) that ``dtype`` holds in ``unit``.

    Depth in metres is above 0; so is whatever stands in unsigned integers, where 0 marks invalid pixels.
    """
    # In memory all depth is float32, which may hold less than the file's type.
    most = float(np.finfo(np.float32).max)
    low, high = (min(max(limit / unit.factor, -most), most) for limit in _stored_limits(dtype, unit))
    return low, high


def _stored_limits(dtype: np.dtype[Any], unit: Unit) -> tuple[float, float]:
    if dtype.kind == "f":
        info = np.finfo(dtype)
        return float(-info.max if unit.per_metre is None else info.smallest_subnormal), float(info.max)
    most = int(np.iinfo(dtype).max)
    # The float next to 2**64 - 1 is 2**64, which would wrap.
    high = float(most) if int(float(most)) <= most else math.nextafter(float(most), 0)
    return 1.0 if dtype.kind == "u" or unit.per_metre is not None else float(np.iinfo(dtype).min), high


def check_range(depth: NDArray[np.floating[Any]], dtype: np.dtype[Any], unit: Unit) -> None:
    """Refuse depths (metres or disparity; not finite = invalid) that ``dtype`` cannot hold in ``unit``.

    Raises:
        InputError: If a value is beyond what the type holds; nothing is ever wrapped.
    """
    low, high = limits(dtype, unit)
    valid = depth[np.isfinite(depth)]
    if valid.size == 0:
        return
    least, most = float(valid.min()), float(valid.max())
    label = f" {unit.label}".rstrip()
    rule = ""
    if least < min(low, 0.0):
        rule = f"at least {min(low, 0.0):g}{label}; got {least:g}{label}"
    # Integers are rounded: half a step more still fits.
    elif most > high and (dtype.kind == "f" or most * unit.factor >= high * unit.factor + 0.5):
        rule = f"at most {high:g}{label}; got {most:g}{label}"
    if rule:
        raise InputError(
            f"depth stored as {dtype} in {unit.name} must be {rule}",
            "keep floats (float input, --format tiff or npy), or say with --unit what the numbers mean",
        )


def encode_depth(
    depth: NDArray[np.floating[Any]],
    *,
    dtype: np.dtype[Any],
    unit: Unit,
    target: Format,
    notes: Mapping[str, str] | None = None,
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

    Raises:
        InputError: If a value is beyond what ``dtype`` holds; nothing is ever wrapped.
    """
    check_range(depth, dtype, unit)
    stored = depth.astype(np.float64)
    stored *= unit.factor
    if dtype.kind in "ui":
        np.rint(stored, out=stored)
        stored[stored == 0] = 1.0
    np.clip(stored, *_stored_limits(dtype, unit), out=stored)
    stored[~np.isfinite(depth)] = 0.0 if dtype.kind in "ui" else np.nan
    texts = {"unit": unit.name, **(notes or {})}
    if unit.per_metre is not None:
        texts["units_per_metre"] = f"{unit.per_metre:.12g}"
    return target.encode(stored.astype(dtype), texts)


def encode_image(path: Path, image: NDArray[np.uint8]) -> bytes:
    """Return the bytes of a picture for ``path`` (.png, .jpg), from (H, W, 3) 8-bit RGB.

    Raises:
        ArgumentError: If the suffix is another one.
    """
    from PIL import Image

    buffer = io.BytesIO()
    kind = check_image_suffix(path)
    Image.fromarray(image).save(buffer, kind, quality=92)
    return buffer.getvalue()


def check_image_suffix(path: Path) -> str:
    """Return Pillow's name of the picture format for ``path``.

    Raises:
        ArgumentError: If the suffix is not .png, .jpg or .jpeg.
    """
    kinds = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
    if path.suffix.lower() not in kinds:
        raise ArgumentError(f"a picture must be .png or .jpg; got {str(path)!r}", "example: --preview preview.png")
    return kinds[path.suffix.lower()]


def check_writable(path: Path) -> None:
    """Refuse, before any work, an output that cannot be written.

    Raises:
        OutputError: If ``path`` is a folder, or its folder is missing or closed.
    """
    if path.is_dir():
        raise OutputError(f"{path}: an output must be a file; this is a folder", f"example: -o {path / 'depth.png'}")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: its folder must exist; {path.parent} does not", f"mkdir -p '{path.parent}'")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: its folder must be writable; {path.parent} is not", "choose another place with -o")


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write files as a whole: each to a temporary file in its folder, flushed to disk; then all are renamed.

    Raises:
        OutputError: If one of them fails; then nothing is left over and older files are untouched.
    """
    # Random names of our own, not tempfile's, so that the files get the usual permissions.
    temporaries = {path: path.parent / f".ddfup-{secrets.token_hex(8)}.tmp" for path in files}
    current = Path()
    try:
        for current, data in files.items():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            with os.fdopen(os.open(temporaries[current], flags, 0o666), "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        for current, temporary in temporaries.items():
            temporary.replace(current)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise OutputError(
            f"{current}: must be writable ({len(files[current])} bytes); got {error.strerror or error}",
            "free some space, or choose another place with -o" if full else "choose another place with -o",
        ) from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
