"""What a file holds: size, type, values and holes of a depth map, and what its numbers probably mean."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddfup import io
from ddfup.errors import ArgumentError, InputError
from ddfup.preview import alone

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_BINS = 16
_COLUMNS = 80
_LABELS = 30
_FIGURE = 8
# Beyond these medians the usual unit is hard to believe: in metres, and in millimetres.
_FAR_METRES, _FAR_MM = 200.0, 20_000.0
# Integers do not say what they count: these are the other usual steps.
_INTEGERS = "integers around"
_OTHERS = ("mm", "tum", "kitti", "vkitti")
_CONFIDENCE = ("low", "medium", "high")
_PICTURES = frozenset({".jpg", ".jpeg", ".webp", ".heic", ".heif"})
_ORIENTATIONS = {
    1: "upright",
    2: "mirrored",
    3: "upside down",
    4: "upside down, mirrored",
    5: "on its left side, mirrored",
    6: "on its left side",
    7: "on its right side, mirrored",
    8: "on its right side",
}


def describe(
    path: Path,
    *,
    unit: io.Unit | None = None,
    invalid: tuple[float, ...] = io.DEFAULT_INVALID,
    max_pixels: int = io.DEFAULT_MAX_PIXELS,
    raw: io.Raw | None = None,
) -> dict[str, Any]:
    """Return what is known about a depth file, a confidence map or a picture, ready for JSON.

    Args:
        path: The file.
        unit: Meaning of stored depth; None: guessed, and said why.
        invalid: Stored values that mean "no measurement".
        max_pixels: Largest number of pixels allowed.
        raw: (width, height) of files without a header; those with a known suffix are read as ever.

    Raises:
        InputError: If the file is none of them, or damaged.
    """
    try:
        row, header, numbers = io.read_stored(path, max_pixels=max_pixels, raw=raw)
    except InputError as error:
        return _picture(path, max_pixels, error)
    valid = np.isfinite(numbers)
    with np.errstate(over="ignore", invalid="ignore"):  # a mark beyond the type, and signalling NaN
        for value in (*invalid, *([] if header.nodata is None else [header.nodata])):
            if np.isfinite(value):
                valid &= numbers != value
    stored = numbers[valid]
    notes = io.read_notes(path) if row.name in io.FORMATS else {}
    guess, reason = (unit, "as given") if unit else guess_unit(stored, notes, path)
    facts: dict[str, Any] = {
        "file": str(path),
        "kind": "depth",
        "format": row.name,
        "bytes": path.stat().st_size,
        "width": header.width,
        "height": header.height,
        "orientation": header.orientation,
        "dtype": str(header.dtype),
        "unit": guess.name if guess else None,
        "unit_reason": reason,
    }
    meaning = guess or io.UNITS["disparity"]
    stored, values = _measured(meaning, stored)
    facts |= {
        "values_in": meaning.label or "stored values",
        "valid_fraction": values.size / numbers.size,
        "holes_fraction": 1 - values.size / numbers.size,
        "stored_minimum": float(stored.min()) if stored.size else None,
        "stored_maximum": float(stored.max()) if stored.size else None,
        "minimum": float(values.min()) if values.size else None,
        "maximum": float(values.max()) if values.size else None,
        "percentiles": {},
        "histogram": {"edges": [], "counts": []},
        "metadata": notes,
        "otherwise": {},
        "levels": {},
    }
    if values.size and unit is None and guess is not None and reason.startswith(_INTEGERS):
        others = (io.UNITS[name] for name in _OTHERS if io.UNITS[name].per_metre != guess.per_metre)
        facts["otherwise"] = {
            other.name: [float(end) / other.factor for end in (stored.min(), stored.max())] for other in others
        }
    if header.dtype.itemsize == 1 and 0 <= int(numbers.min()) <= int(numbers.max()) < len(_CONFIDENCE):
        counts = np.bincount(numbers.ravel(), minlength=len(_CONFIDENCE))
        facts["levels"] = {str(level): count for level, count in enumerate(counts.tolist())}
    if values.size:
        marks = np.percentile(values, PERCENTILES)
        facts["percentiles"] = {str(share): float(mark) for share, mark in zip(PERCENTILES, marks, strict=True)}
        # What lies outside goes into the outer bars: a few outliers must not press all others into one.
        ends = (marks[0], marks[-1]) if marks[-1] > marks[0] else (values.min(), values.max())
        counts, edges = np.histogram(np.clip(values, *ends), _BINS, ends)
        facts["histogram"] = {"edges": edges.tolist(), "counts": counts.tolist()}
    return facts


def _measured(unit: io.Unit, stored: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return stored values that a unit has a meaning for, and what they mean: no depth is 0 or less."""
    if unit.coding and stored.dtype.str[1:] != "u2":
        raise ArgumentError(f"unit {unit.name} is for unsigned 16-bit values; got {stored.dtype}")
    values = unit.from_stored(stored)
    if not unit.label:
        return stored, values
    kept = np.isfinite(values) & (values > 0)
    return stored[kept], values[kept]


def _picture(path: Path, max_pixels: int, error: InputError) -> dict[str, Any]:
    try:
        header = io.read_guide_header(path, max_pixels=max_pixels)
    except InputError as other:
        # Of the two complaints, that about what the file's name promises. One that is neither by name is told so.
        if io.format_of(path) is not None or not path.is_file() or path.suffix.lower() in _PICTURES:
            raise (error if io.format_of(path) is not None else other) from None
        raise InputError(
            f"{path}: must be a depth file or a picture; its name and content are neither",
            "numbers without a header need a size: --raw 256x192",
        ) from None
    bits = {"png": "16 bits", "tiff": "16 bits", "exr": "linear light"}.get(header.decoder, "8 bits")
    return {
        "file": str(path),
        "kind": "picture",
        "format": header.format.lower(),
        "bytes": path.stat().st_size,
        "width": header.width,
        "height": header.height,
        "values": bits,
        "orientation": header.orientation,
        "stored": _ORIENTATIONS[header.orientation],
    }


def draw(
    path: Path,
    facts: Mapping[str, Any],
    *,
    invalid: tuple[float, ...] = io.DEFAULT_INVALID,
    max_pixels: int = io.DEFAULT_MAX_PIXELS,
    raw: io.Raw | None = None,
) -> NDArray[np.uint8]:
    """Return a picture of a depth file in the unit that `describe` found; what has none is shown as it is stored.

    Args:
        path: The file.
        facts: What `describe` returned for it.
        invalid: As for `describe`.
        max_pixels: As for `describe`.
        raw: As for `describe`.

    Raises:
        InputError: If no pixel is valid.
    """
    name = facts["unit"]
    unit = io.parse_unit(name.removesuffix("/m")) if name else io.UNITS["disparity"]
    # In a confidence map 0 is a level like the others.
    marks = () if facts["levels"] else invalid
    depth = io.read_depth(path, unit=unit, invalid=marks, max_pixels=max_pixels, raw=raw)
    return alone(depth.depth, label=unit.label or name or "")


def guess_unit(stored: NDArray[Any], notes: Mapping[str, str], path: Path) -> tuple[io.Unit | None, str]:
    """Guess what stored depth means, and say why.

    Args:
        stored: (N,) stored values of pixels with a measurement.
        notes: Texts in the file.
        path: The file; its name may say that it is disparity.

    Returns:
        The unit, or None where none is likely; the reason, a few words.
    """
    written = notes.get("ddfup:unit", "")
    if written:
        try:
            return io.parse_unit(written.removesuffix("/m")), "ddfup wrote it into the file"
        except ArgumentError:
            return None, f"the file names an unknown unit, {written[:40]!r}"
    if not stored.size:
        return None, "no value to guess from"
    above = stored[stored > 0]  # the others are disparity, or holes
    middle = float(np.median(above if above.size else stored))
    if "disp" in path.stem.lower():
        return io.UNITS["disparity"], "its name says disparity"
    if stored.dtype.kind == "f":
        if middle > _FAR_METRES:
            return io.UNITS["mm"], f"floats around {middle:.4g}: too far for metres"
        return io.UNITS["m"], f"floats around {middle:.4g}"
    if stored.dtype.itemsize == 1:
        if int(stored.max()) <= 2 and int(stored.min()) >= 0:
            return None, "8 bits up to 2: a confidence map"
        return None, "8 bits: disparity, a colour map or a grey picture"
    if stored.dtype.str[1:] == "u2":
        turned = io.UNITS["nyu-raw"].from_stored(stored)
        plain = stored.astype(np.uint16).byteswap()
        if int(stored.max()) > 2047 >= int(plain.max()) and np.isfinite(turned).any():
            return io.UNITS["nyu-raw"], "11-bit values, bytes swapped: raw disparity of a Kinect"
        if int(stored.max()) > 16_384 and not (stored & 7).any():
            return io.UNITS["sunrgbd"], "multiples of 8, the largest large: rotated by 3 bits"
    if middle > _FAR_MM:
        return io.UNITS["tum"], f"{_INTEGERS} {middle:.5g}: far for mm, likely 5000 per metre"
    return io.UNITS["mm"], f"{_INTEGERS} {middle:.5g}"


def lines(facts: Mapping[str, Any], *, blocks: str = " ▏▎▍▌▋▊▉█") -> Iterator[str]:
    """Yield what `describe` returns as lines of text, at most 80 columns but for metadata.

    Args:
        facts: The description.
        blocks: Characters from empty to full that bars are drawn with.
    """
    size = f"{facts['width']}x{facts['height']}"
    if facts["kind"] == "picture":
        yield _line("picture", f"{facts['format'].upper()}, {size}, {facts['values']}, {facts['bytes']} bytes")
        yield _orientation(facts["orientation"])
        return
    kind = "confidence" if facts["levels"] else "depth"
    yield _line(kind, f"{facts['format'].upper()}, {size}, {facts['dtype']}, {facts['bytes']} bytes")
    if facts["orientation"] != 1:
        yield _orientation(facts["orientation"])
    if facts["levels"]:
        pixels = facts["width"] * facts["height"]
        shares = (
            f"{level} ({name}) {count / pixels:.1%}"
            for (level, count), name in zip(facts["levels"].items(), _CONFIDENCE, strict=True)
        )
        yield _line("levels", ", ".join(shares))
        yield _line("use", "beside its depth: --confidence")
        yield from (_line("metadata", f"{key}: {text}") for key, text in facts["metadata"].items())
        return
    yield _line("unit", f"{facts['unit'] or 'unknown'} ({facts['unit_reason']})")
    if facts["otherwise"]:
        ranges = (f"{name} {low:.3g} to {high:.3g} m" for name, (low, high) in facts["otherwise"].items())
        for number, text in enumerate(textwrap.wrap(", ".join(ranges), _COLUMNS - len(_line("", "")))):
            yield _line("" if number else "otherwise", text)
    label = "" if facts["values_in"] == "stored values" else f" {facts['values_in']}"
    holes = round(facts["holes_fraction"] * facts["width"] * facts["height"])
    if facts["minimum"] is not None:
        stored = f"stored {facts['stored_minimum']:.6g} to {facts['stored_maximum']:.6g}"
        yield _line("range", f"{facts['minimum']:.6g} to {facts['maximum']:.6g}{label} ({stored})")
        yield _line("percentiles", "".join(f"{share + ' %':>9}" for share in facts["percentiles"]))
        yield _line("", "".join(f"{_figure(mark):>9}" for mark in facts["percentiles"].values()))
    yield _line("holes", f"{facts['holes_fraction']:.1%} ({holes} pixels)")
    for key, text in facts["metadata"].items():
        yield _line("metadata", f"{key}: {text}")
    edges, counts = facts["histogram"]["edges"], facts["histogram"]["counts"]
    if counts:
        yield ""
    most, total = max(counts, default=0), sum(counts)
    room = _COLUMNS - _LABELS - 8
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        name = f"{_figure(low)} to {_figure(high)}{label}".rjust(_LABELS)
        yield f"{name} {_bar(count / most * room, blocks):<{room}} {count / total:>6.1%}"


def _line(name: str, text: str) -> str:
    return f"{name:<12} {text}"


def _orientation(orientation: int) -> str:
    return _line("orientation", f"EXIF {orientation}: stored {_ORIENTATIONS[orientation]}")


def _figure(value: float) -> str:
    """Write a number in at most 8 characters: of 4 digits, or whole; with an exponent where neither fits."""
    whole = f"{value:.0f}"
    if abs(value) >= 9999.5 and len(whole) <= _FIGURE:
        return whole
    return next(text for digits in (4, 3, 2, 1) if len(text := f"{value:.{digits}g}") <= _FIGURE)


def _bar(length: float, blocks: str) -> str:
    steps = len(blocks) - 1
    whole, part = divmod(round(length * steps), steps)
    return blocks[-1] * whole + (blocks[part] if part else "")
