"""The low resolution that every method starts from: its values, and where in the image its samples lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ddfup.degrade import degrade, sample
from ddfup.errors import InputError

Positions = NDArray[np.float64]


@dataclass(frozen=True)
class LowResolution:
    """A degraded depth map.

    Attributes:
        depth: (h, w) float32.
        valid: (h, w) bool, where there is a measurement.
        rows: (h,) row of each sample, in pixels of the high resolution; pixel centres are whole numbers.
        columns: (w,) the same for columns.
        size: (H, W) of the high resolution.
        factor: High-resolution over low-resolution length.
    """

    depth: NDArray[np.float32]
    valid: NDArray[np.bool_]
    rows: Positions
    columns: Positions
    size: tuple[int, int]
    factor: float


def cut_to(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Return the size after cutting the lower and right ends to multiples of the factor, if it is whole.

    With a whole factor the low-resolution pixels are squares of the same size everywhere, as the published
    figures have it.

    Raises:
        InputError: If nothing is left.

    Example:
        >>> cut_to((370, 463), 16), cut_to((370, 463), 7.5)
        ((368, 448), (370, 463))
    """
    if factor != int(factor):
        return size
    height, width = (length - length % int(factor) for length in size)
    if not (height and width):
        raise InputError(
            f"an image must be at least {factor:g}x{factor:g} pixels for x{factor:g}; got {size[1]}x{size[0]}",
            "leave this --factor out",
        )
    return height, width


def make(
    truth: NDArray[np.floating[Any]], factor: float, kind: str, rng: np.random.Generator, *, lift: float = 0.0
) -> LowResolution:
    """Degrade true depth.

    Args:
        truth: (H, W), cut to ``cut_to``; not finite, or not above ``-lift``: no measurement.
        factor: At least 1.
        kind: Name of a row of ``ddfup.degrade.DEGRADATIONS``.
        rng: Randomness of the noisy kinds.
        lift: 1 for levels of disparity of which 0 is one: they are counted from 1 meanwhile.

    Raises:
        InputError: If no low-resolution pixel has a measurement.
    """
    depth = degrade(truth + np.float32(lift), factor, kind, rng=rng)
    # Not "above 0": the bicubic filter's undershoot beside a near object may be anything.
    valid = depth != 0
    if not valid.any():
        raise InputError(f"the x{factor:g} {kind} low resolution has no measurement", "the true depth is too sparse")
    positions = [
        # What was taken from a ramp says where it was taken.
        sample(np.arange(large, dtype=np.float32)[:, None], (small, 1))[:, 0].astype(np.float64)
        if kind == "nearest"
        else (np.arange(small) + 0.5) * (large / small) - 0.5
        for large, small in zip(truth.shape, depth.shape, strict=True)
    ]
    depth = np.where(valid, depth - np.float32(lift), np.float32(0))
    return LowResolution(depth, valid, positions[0], positions[1], (truth.shape[0], truth.shape[1]), factor)


def filled(depth: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Give pixels without measurement the value of the nearest one that has it.

    Args:
        depth: (h, w).
        valid: (h, w), where there is a measurement; somewhere at least.

    Example:
        >>> filled(np.array([[5, 0, 0, 7]], np.float32), np.array([[True, False, False, True]]))
        array([[5., 5., 7., 7.]])
    """
    if valid.all():
        return depth.astype(np.float64)
    _, labels = cv2.distanceTransformWithLabels(
        (~valid).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    values = np.zeros(int(labels.max()) + 1)
    values[labels[valid]] = depth[valid]
    return np.asarray(values[labels], np.float64)
