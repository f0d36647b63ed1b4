"""The measures of a benchmark: those of all depth maps, and how holes of the low resolution were filled."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ddfup.benchmark.low_resolution import LowResolution
from ddfup.metrics import Metric, Thresholds, describe, rmse

_HOLES = {
    "hole_rmse": Metric(
        "depth", "lower", "Hole RMSE", "RMSE of the pixels whose low-resolution pixel has no measurement."
    ),
    "rim_rmse": Metric(
        "depth", "lower", "Rim RMSE", "RMSE of the pixels with a measurement of which a neighbouring one has none."
    ),
}


def describe_measures(thresholds: Thresholds) -> dict[str, Metric]:
    """Return the table of measures: name -> meaning."""
    return describe(thresholds) | _HOLES


def hole_figures(
    result: NDArray[np.floating[Any]],
    truth: NDArray[np.floating[Any]],
    low: LowResolution,
    counted: tuple[slice, slice],
) -> dict[str, float]:
    """Measure inside the holes of the low resolution, and on the ring of low-resolution pixels around them.

    Args:
        result: (H, W).
        truth: (H, W); 0, negative or not finite = unknown.
        low: What the method started from.
        counted: The pixels that count, as of the whole image.

    Returns:
        ``hole_rmse`` and ``rim_rmse``, NaN without such pixels.
    """
    holes = (~low.valid).astype(np.uint8)
    rim = (cv2.dilate(holes, np.ones((3, 3), np.uint8)) > 0) & low.valid
    known = np.isfinite(truth) & (truth > 0)
    figures = {}
    for name, cells in (("hole_rmse", ~low.valid), ("rim_rmse", rim)):
        rows, columns = (
            ((np.arange(large) + 0.5) * small / large).astype(np.intp)
            for small, large in zip(cells.shape, truth.shape, strict=True)
        )
        inside = cells[np.ix_(rows, columns)]
        some = (inside & known)[counted].any()
        figures[name] = rmse(result[counted], truth[counted], inside[counted]) if some else math.nan
    return figures
