"""What a stored number means in metres, and which numbers a type can hold.

Not for use from outside: `ddfup.io` is the door.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddfup.errors import ArgumentError, InputError

# Depth of the first Kinect from its raw disparity d, as fitted by the authors of NYU Depth: a / (b - d) metres.
_NYU_A, _NYU_B = 351.3, 1092.5
# Depth is stored this many pixels at a time, or a row.
_STRIP_PIXELS = 1 << 20


@dataclass(frozen=True)
class Unit:
    """What a stored number means.

    Attributes:
        name: As the user writes it: ``mm``, ``m``, ``disparity``, a preset, or units per metre.
        per_metre: Stored units in one metre; None for disparity, which is kept as it is.
        coding: How 16-bit integers are stored beyond that: "" as they are, "rotated" left by 3 bits, or
            "kinect": disparity of the first Kinect, its two bytes swapped.
    """

    name: str
    per_metre: float | None
    coding: str = ""

    @property
    def factor(self) -> float:
        """Stored value of 1 (one metre, or one step of disparity)."""
        return 1.0 if self.per_metre is None else self.per_metre

    @property
    def label(self) -> str:
        """Unit of the values in memory: ``m``, or nothing for disparity."""
        return "" if self.per_metre is None else "m"

    def from_stored(self, raw: NDArray[Any]) -> NDArray[np.float64]:
        """Return metres (or disparity) of stored values; infinite where they mean nothing."""
        if self.coding == "kinect":
            number = raw.astype(np.uint16).byteswap().astype(np.float64)
            return np.asarray(np.where(number < _NYU_B, _NYU_A / (_NYU_B - number), np.inf))
        if self.coding == "rotated":
            number16 = raw.astype(np.uint16)
            raw = (number16 >> 3) | (number16 << 13)
        metres: NDArray[np.float64] = raw / np.float64(self.factor)
        return metres

    def to_number(self, depth: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what `pack` is to store for metres (or disparity), before rounding."""
        if self.coding == "kinect":
            return np.asarray(_NYU_B - _NYU_A / depth)
        return depth * self.factor

    def pack(self, number: NDArray[Any]) -> NDArray[Any]:
        """Return rounded numbers in the order of bits that the file has."""
        if self.coding == "kinect":
            return np.asarray(number.byteswap())
        if self.coding == "rotated":
            return np.asarray((number << 3) | (number >> 13))
        return number


UNITS: dict[str, Unit] = {
    unit.name: unit
    for unit in (
        Unit("mm", 1000.0),
        Unit("m", 1.0),
        Unit("disparity", None),
        Unit("tum", 5000.0),
        Unit("kitti", 256.0),
        Unit("vkitti", 100.0),
        Unit("scannet", 1000.0),
        Unit("arkit", 1000.0),
        Unit("realsense", 1000.0),
        Unit("sunrgbd", 1000.0, "rotated"),
        Unit("nyu-raw", 1.0, "kinect"),
    )
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


def limits(dtype: np.dtype[Any], unit: Unit, *, zero_is_valid: bool = False) -> tuple[float, float]:
    """Return the smallest and largest valid depth (metres or disparity) that ``dtype`` holds in ``unit``.

    Depth in metres is above 0; so is whatever stands in unsigned integers, where 0 marks invalid pixels unless
    ``zero_is_valid``, which is for disparity.
    """
    if unit.coding == "kinect":
        low, high = (_NYU_A / (_NYU_B - number) for number in stored_limits(dtype, unit))
        return low, high
    # In memory all depth is float32, which may hold less than the file's type.
    most = float(np.finfo(np.float32).max)
    stored = stored_limits(dtype, unit, zero_is_valid=zero_is_valid)
    low, high = (min(max(limit / unit.factor, -most), most) for limit in stored)
    return low, high


def stored_limits(dtype: np.dtype[Any], unit: Unit, *, zero_is_valid: bool = False) -> tuple[float, float]:
    """Return the smallest and largest valid number that ``dtype`` holds in ``unit``, before packing."""
    if unit.coding == "kinect":
        return 1.0, math.floor(_NYU_B)
    if dtype.kind == "f":
        info = np.finfo(dtype)
        return float(-info.max if unit.per_metre is None else info.smallest_subnormal), float(info.max)
    most = int(np.iinfo(dtype).max)
    # The float next to 2**64 - 1 is 2**64, which would wrap.
    high = float(most) if int(float(most)) <= most else math.nextafter(float(most), 0)
    if unit.per_metre is None and (dtype.kind == "i" or zero_is_valid):
        return float(np.iinfo(dtype).min), high
    return 1.0, high


def check_range(depth: NDArray[np.floating[Any]], dtype: np.dtype[Any], unit: Unit) -> None:
    """Refuse depths (metres or disparity; not finite = invalid) that ``dtype`` cannot hold in ``unit``.

    Raises:
        InputError: If a value is beyond what the type holds; nothing is ever wrapped.
    """
    low, high = limits(dtype, unit)
    least, most = np.inf, -np.inf
    for part in _parts(depth):
        valid = part[np.isfinite(part)]
        if valid.size:
            least, most = min(least, float(valid.min())), max(most, float(valid.max()))
    if least > most:
        return
    label = f" {unit.label}".rstrip()
    rule = ""
    # Half a step less than 1 still rounds to it. In plain units all from 0 up is small, not wrong.
    floor = _NYU_A / (_NYU_B - 0.5) if unit.coding == "kinect" else min(low, 0.0)
    if least < floor:
        rule = f"at least {floor:g}{label}; got {least:g}{label}"
    # Integers are rounded: half a step more still fits.
    elif most > high and unit.coding != "kinect" and _beyond(most, high, dtype, unit):
        rule = f"at most {high:g}{label}; got {most:g}{label}"
    if rule:
        raise InputError(
            f"depth stored as {dtype} in {unit.name} must be {rule}",
            "keep floats (float input, --format exr, tiff or npy), or say with --unit what the numbers mean",
        )


def _beyond(most: float, high: float, dtype: np.dtype[Any], unit: Unit) -> bool:
    return dtype.kind == "f" or most * unit.factor >= high * unit.factor + 0.5


def dequantise(stored: NDArray[Any], unit: Unit) -> NDArray[np.float32]:
    """Return metres (or disparity) of stored values, infinite where float32 or the unit has none."""
    depth = np.empty(stored.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for part, target in zip(_parts(stored), _parts(depth), strict=True):
            target[...] = unit.from_stored(part)
    return depth


def quantise(
    depth: NDArray[np.floating[Any]], dtype: np.dtype[Any], unit: Unit, *, zero_is_valid: bool = False
) -> NDArray[Any]:
    """Return depth (metres or disparity; not finite = invalid) as it is stored.

    Integers are rounded and mark invalid pixels with 0, floats with NaN. A valid value between 0 and the
    smallest of `limits` becomes that smallest one, so that it does not read as invalid; small negative disparity
    in signed integers becomes -1 for the same reason. Where the whole map is valid and 0 is a disparity like any
    other (``zero_is_valid``), 0 stays 0.

    Raises:
        InputError: If a value is beyond what ``dtype`` holds; nothing is ever wrapped.
    """
    check_range(depth, dtype, unit)
    stored = np.empty(depth.shape, dtype)
    for part, target in zip(_parts(depth), _parts(stored), strict=True):
        target[...] = _quantise(part, dtype, unit, zero_is_valid)
    return stored


def _quantise(depth: NDArray[np.floating[Any]], dtype: np.dtype[Any], unit: Unit, zero_is_valid: bool) -> NDArray[Any]:
    with np.errstate(divide="ignore", invalid="ignore"):
        number = unit.to_number(depth.astype(np.float64))
    if dtype.kind in "ui":
        np.rint(number, out=number)
        if not zero_is_valid:
            small = number == 0
            number[small] = np.copysign(1.0, number[small])
    np.clip(number, *stored_limits(dtype, unit, zero_is_valid=zero_is_valid), out=number)
    number[~np.isfinite(depth)] = 0.0 if dtype.kind in "ui" else np.nan
    return unit.pack(number.astype(dtype))


def _parts(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Cut an array into strips: float64 copies of all of a large depth map would be most of the memory in use."""
    rows = max(1, _STRIP_PIXELS * len(array) // max(1, array.size))
    for top in range(0, len(array), rows):
        yield array[top : top + rows]
