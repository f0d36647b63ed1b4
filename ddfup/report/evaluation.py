"""One image of a report: read its files, measure it, paint it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddfup import guides, io
from ddfup.errors import DDFUpError, InputError
from ddfup.metrics import Thresholds, evaluate
from ddfup.report.pairs import Sample
from ddfup.report.pictures import Pictures, paint
from ddfup.report.results import Row


@dataclass(frozen=True)
class Options:
    """How files are read and what counts.

    Attributes:
        unit: Meaning of stored depth; None: integers are millimetres, floats metres.
        truth_unit: The same for ground truth; None: as ``unit``.
        invalid: Stored values that mean "no measurement".
        crop_border: Pixels left out along each side.
        max_depth: Pixels of larger true depth are left out, metres.
        thresholds: Lines of the bad-pixel and edge measures.
        max_pixels: Largest number of pixels of an image.
    """

    unit: io.Unit | None = None
    truth_unit: io.Unit | None = None
    invalid: tuple[float, ...] = io.DEFAULT_INVALID
    crop_border: int = 0
    max_depth: float | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    max_pixels: int = io.DEFAULT_MAX_PIXELS


@dataclass(frozen=True)
class Examined:
    """An image that was looked at.

    Attributes:
        row: Its measures, or why there are none.
        pictures: What to show; None if it failed.
    """

    row: Row
    pictures: Pictures | None


def examine(sample: Sample, options: Options, *, thumbnail_bytes: int, thumbnail_side: int) -> Examined:
    """Measure and paint one image; files that cannot be used make a failed row, not an exception.

    Args:
        sample: The files.
        options: How to read and measure.
        thumbnail_bytes: Most bytes of one thumbnail.
        thumbnail_side: Longest side of a thumbnail, in pixels.
    """
    row = Row(sample.name, str(sample.prediction), str(sample.truth), "ok")
    try:
        given, true = _read_both(sample, options)
        valid = _mask(sample, true.depth.shape, options)
        border = options.crop_border
        inner = np.s_[border : true.depth.shape[0] - border, border : true.depth.shape[1] - border]
        if true.depth[inner].size == 0:
            size = f"{true.depth.shape[1]}x{true.depth.shape[0]}"
            raise InputError(f"{sample.truth}: must be larger than a border of {border} px on each side; got {size}")
        figures = evaluate(
            given.depth[inner],
            true.depth[inner],
            valid=None if valid is None else valid[inner],
            max_depth=options.max_depth,
            thresholds=options.thresholds,
        )
        guide = io.read_guide(sample.guide, max_pixels=options.max_pixels) if sample.guide else None
        low = _read(sample.low, options.unit, options).depth if sample.low else None
        pictures = paint(
            given.depth,
            true.depth,
            guide=guide,
            low=low,
            label=true.unit.label,
            thumbnail_bytes=thumbnail_bytes,
            thumbnail_side=thumbnail_side,
        )
    except DDFUpError as error:
        message = error.message if str(sample.prediction) in error.message else f"{sample.prediction}: {error.message}"
        return Examined(replace(row, status="failed", error=message), None)
    height, width = true.depth.shape
    return Examined(replace(row, width=width, height=height, figures=figures), pictures)


def _read(path: Path, unit: io.Unit | None, options: Options) -> io.DepthMap:
    return io.read_depth(path, unit=unit, invalid=options.invalid, max_pixels=options.max_pixels)


def _read_both(sample: Sample, options: Options) -> tuple[io.DepthMap, io.DepthMap]:
    given = _read(sample.prediction, options.unit, options)
    true = _read(sample.truth, options.truth_unit or options.unit, options)
    if given.depth.shape != true.depth.shape:
        sizes = [f"{each.depth.shape[1]}x{each.depth.shape[0]}" for each in (true, given)]
        raise InputError(f"{sample.prediction}: must have the size of {sample.truth}, {sizes[0]}; got {sizes[1]}")
    if given.unit.label != true.unit.label:
        raise InputError(
            f"{sample.prediction} and {sample.truth} must both be depth or both disparity; "
            f"got {given.unit.name} and {true.unit.name}"
        )
    return given, true


def _mask(sample: Sample, shape: tuple[int, ...], options: Options) -> NDArray[np.bool_] | None:
    if sample.mask is None:
        return None
    mask = _read_mask(sample.mask, options.max_pixels)
    if mask.shape != shape:
        raise InputError(
            f"{sample.mask}: must have the size of {sample.truth}, {shape[1]}x{shape[0]}; "
            f"got {mask.shape[1]}x{mask.shape[0]}"
        )
    return mask


def _read_mask(path: Path, max_pixels: int) -> NDArray[np.bool_]:
    """Read which pixels count: those that are not 0, or not black."""
    try:
        if path.suffix.lower() == ".png":
            return np.asarray(guides.read_guide(path, max_pixels=max_pixels).any(axis=2))
        with contextlib.suppress(OSError, ValueError):  # of what is no such file, the reader below says why
            flags = np.load(path, mmap_mode="r", allow_pickle=False)
            is_flags = isinstance(flags, np.ndarray) and flags.dtype == np.bool_ and flags.ndim == 2
            if is_flags and flags.size <= max_pixels:
                return np.array(flags)
        # As disparity: the numbers themselves, of any type.
        return io.read_depth(path, unit=io.UNITS["disparity"], invalid=(0.0,), max_pixels=max_pixels).valid
    except InputError as error:
        hint = "save masks as PNG, or as other files of one number a pixel"
        raise InputError(f"{error.message} (as a mask)", hint) from error
