"""What a depth loses on its way through a file: format x type x unit, judged by decoders that are not ours."""

import io as stdio
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import OpenEXR
import tifffile
from depth_files import save

from ddfup import io
from ddfup.errors import InputError

ALL_UNITS = ["mm", "m", "disparity", "tum", "kitti", "vkitti", "sunrgbd", "nyu-raw", "123.4"]
TABLE = [(name, np.dtype(code)) for name, row in io.FORMATS.items() for code in sorted(row.dtypes)]


def decode(data: bytes, name: str, folder: Path) -> np.ndarray:
    """Decode by code that is not the project's."""
    if name == "exr":
        with OpenEXR.File(str(save(folder / "oracle.exr", data)), separate_channels=True) as file:
            return file.channels()["Z"].pixels
    if name in ("png", "pfm", "pgm"):
        return cv2.imread(str(save(folder / f"oracle.{name}", data)), cv2.IMREAD_UNCHANGED)
    if name == "tiff":
        return tifffile.imread(stdio.BytesIO(data))
    loaded = np.load(stdio.BytesIO(data))
    return loaded["depth"] if name == "npz" else loaded


def units_of(dtype: np.dtype) -> list[io.Unit]:
    units = [io.parse_unit(text) for text in ALL_UNITS]
    return [unit for unit in units if not unit.coding or dtype == np.uint16]


def number_of(value: int, unit: io.Unit) -> int:
    """Undo what a unit does to the bits of 16-bit integers, in Python's own integers."""
    if unit.name == "sunrgbd":
        return (value >> 3) | ((value & 7) << 13)
    return int.from_bytes(value.to_bytes(2, "little"), "big") if unit.name == "nyu-raw" else value


def exact_number(depth: float, unit: io.Unit) -> Fraction:
    """What a depth is in stored units, as it would be without rounding."""
    if unit.name == "nyu-raw":
        return Fraction(10925, 10) - Fraction(3513, 10) / Fraction(depth)
    return Fraction(depth) * Fraction(unit.factor)


def depths_for(shares: np.ndarray, invalid: np.ndarray, dtype: np.dtype, unit: io.Unit) -> np.ndarray:
    """Spread shares of 0 to 1 over all that a type holds in a unit; NaN where invalid."""
    low, high = (float(np.clip(end, -1e5, 1e5)) for end in io.limits(dtype, unit))
    depth = (low + shares * (high - low)).astype(np.float32)
    # Rounding to float32 may step beyond either end.
    depth = np.clip(depth, np.nextafter(np.float32(low), np.float32(1)), np.nextafter(np.float32(high), np.float32(1)))
    depth.flat[0] = low + 0.7 * (high - low)
    depth[invalid] = np.nan
    return depth


@dataclass
class Errors:
    """Largest errors of a round trip, in steps of the stored type.

    Attributes:
        stored: Of the numbers in the file: units of an integer; spacings of a float at the value.
        near_zero: The same for integers that would round to 0, the mark of invalid pixels, and become 1 or -1.
        read: Of what is read again, relative to the stored number.
        masks: Pixels whose validity is not what it was.
        values: Number of values that were tried.
    """

    stored: float = 0.0
    near_zero: float = 0.0
    read: float = 0.0
    masks: int = 0
    values: int = 0

    @property
    def fine(self) -> bool:
        """Whether nothing is worse than rounding explains."""
        return self.stored <= 0.5 + 1e-6 and self.near_zero <= 1 and self.read <= 1e-6 and not self.masks


def round_trip(name: str, dtype: np.dtype, unit: io.Unit, depth: np.ndarray, folder: Path) -> Errors:
    """Write depth (NaN = invalid), decode it by another library, read it again, and compare both exactly."""
    row, invalid, errors = io.FORMATS[name], np.isnan(depth), Errors()
    data = io.encode_depth(depth, dtype=dtype, unit=unit, target=row)
    stored = decode(data, name, folder)
    assert stored.dtype == dtype and stored.shape == depth.shape, unit
    # Exactly what was invalid is marked, and nothing else.
    marked = np.isnan(stored) if dtype.kind == "f" else stored == 0
    errors.masks = int((marked != invalid).sum())
    errors.values = int((~invalid).sum())
    for value, found in zip(depth[~invalid].tolist(), stored[~invalid].tolist(), strict=True):
        wanted = exact_number(value, unit)
        if dtype.kind == "f":
            limit = np.finfo(dtype)
            # The distance between neighbours at this size; there are two thirds as many below a power of two.
            step = max(
                Fraction(2) ** _exponent(wanted) * Fraction(float(limit.eps)), Fraction(float(limit.smallest_subnormal))
            )
            errors.stored = max(errors.stored, float(abs(Fraction(found) - wanted) / step))
        else:
            off = float(max(Fraction(0), abs(number_of(found, unit) - wanted) - abs(wanted) / 2**50))
            if abs(wanted) > Fraction(1, 2):
                errors.stored = max(errors.stored, off)
            else:
                errors.near_zero = max(errors.near_zero, off)
    again = io.read_depth(save(folder / f"d{row.suffixes[0]}", data), unit=unit)
    valid = ~invalid & (stored != 0)  # a float disparity of exactly 0 reads as invalid
    errors.masks += int((again.valid != valid).sum())
    assert again.dtype == dtype and again.unit == unit
    for found, kept in zip(again.depth[valid].tolist(), stored[valid].tolist(), strict=True):
        number = kept if dtype.kind == "f" else number_of(kept, unit)
        # Depth in memory is float32.
        size = max(1100 if unit.coding else 1, abs(number))
        errors.read = max(errors.read, float(abs(exact_number(found, unit) - Fraction(number)) / Fraction(size)))
    return errors


def _exponent(value: Fraction) -> int:
    """Largest e with 2**e <= abs(value); far below all floats for 0."""
    value = abs(value)
    if not value:
        return -2000
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if Fraction(2) ** guess <= value else guess - 1


def beyond(name: str, dtype: np.dtype, unit: io.Unit, value: np.float32, folder: Path) -> tuple[bool, float]:
    """Write a value that may not fit.

    Returns:
        Whether it was refused, and else the error of what was stored, in steps: more than half means wrapped.
    """
    depth = np.array([[0.5, value]], np.float32)
    try:
        data = io.encode_depth(depth, dtype=dtype, unit=unit, target=io.FORMATS[name])
    except InputError as error:
        assert "at most" in error.message
        return True, 0.0
    number = number_of(int(decode(data, name, folder)[0, 1]), unit)
    if unit.name == "nyu-raw":  # 1092 means "very far": all beyond is nearest to it
        return False, float(abs(number - 1092))
    wanted = exact_number(float(value), unit)
    most = np.iinfo(dtype).max
    assert wanted < most + Fraction(1, 2), f"{value} in {unit} must be refused"
    return False, float(max(Fraction(0), abs(number - wanted) - wanted / 2**50))


def measure(name: str, dtype: np.dtype, unit: io.Unit, values: int, folder: Path, *, seed: int = 0) -> Errors:
    """Try random depths, an eighth of them holes."""
    generator = np.random.default_rng([seed, *f"{name}{dtype}{unit.name}".encode()])
    # Half of them evenly, half of them small.
    shares = generator.random((8, max(1, values // 8)))
    shares[::2] **= 8
    invalid = generator.random(shares.shape) < 1 / 8
    invalid.flat[0] = False
    return round_trip(name, dtype, unit, depths_for(shares, invalid, dtype, unit), folder)
