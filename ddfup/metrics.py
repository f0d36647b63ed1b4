"""Quality of predicted depth against ground truth; numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ddfup.errors import ArgumentError

Floats = NDArray[np.floating]


def _errors(pred: Floats, gt: Floats, valid: NDArray[np.bool_] | None) -> NDArray[np.float64]:
    if pred.shape != gt.shape:
        raise ArgumentError(f"pred must have the shape of gt = {gt.shape}; got {pred.shape}")
    mask = np.isfinite(gt) & (gt > 0) & np.isfinite(pred)
    if valid is not None:
        mask &= valid
    if not mask.any():
        raise ArgumentError("no pixel is valid in both pred and gt", "check units and invalid values")
    return pred[mask].astype(np.float64) - gt[mask]


def rmse(pred: Floats, gt: Floats, valid: NDArray[np.bool_] | None = None) -> float:
    """Root mean square error in the arrays' unit.

    Args:
        pred: Any shape; non-finite = no prediction, left out.
        gt: Same shape; 0, negative or non-finite = no measurement, left out.
        valid: Same shape; further restriction.

    Returns:
        The error, in the unit of the arguments.

    Raises:
        ArgumentError: If shapes differ or no pixel is left.

    Example:
        >>> rmse(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
        1.4142135623730951
    """
    return float(np.sqrt(np.mean(_errors(pred, gt, valid) ** 2)))


def mae(pred: Floats, gt: Floats, valid: NDArray[np.bool_] | None = None) -> float:
    """Mean absolute error in the arrays' unit; arguments as of :func:`rmse`.

    Example:
        >>> mae(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
        1.0
    """
    return float(np.mean(np.abs(_errors(pred, gt, valid))))


METRICS = {"rmse": rmse, "mae": mae}
