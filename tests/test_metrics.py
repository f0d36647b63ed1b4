"""Metrics against numbers worked out by hand, and what they leave out."""

import numpy as np
import pytest

from ddfup.errors import ArgumentError
from ddfup.metrics import METRICS, mae, rmse


def test_values_by_hand():
    pred, gt = np.array([[1.0, 2.0], [5.0, 8.0]]), np.array([[1.0, 4.0], [4.0, 6.0]])
    assert rmse(pred, gt) == 1.5
    assert mae(pred, gt) == 1.25


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_unmeasured_and_unpredicted_pixels_are_left_out(metric):
    gt = np.array([2.0, 0.0, -1.0, np.nan, np.inf, 2.0, 2.0])
    pred = np.array([2.5, 9.0, 9.0, 9.0, 9.0, np.nan, 1.5])
    assert metric(pred, gt) == 0.5
    assert metric(pred, gt, np.array([True] * 6 + [False])) == 0.5
    pred[6] = 9
    assert metric(pred, gt) > 0.5
    assert metric(pred, gt, np.array([True] * 6 + [False])) == 0.5


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_a_perfect_prediction_has_no_error_and_units_scale(metric):
    rng = np.random.default_rng(0)
    gt, noise = rng.uniform(1, 5, (2, 9, 11))
    assert metric(gt, gt) == 0
    assert metric(1000 * (gt + noise), 1000 * gt) == pytest.approx(1000 * metric(gt + noise, gt))


def test_rmse_is_exact_for_float32_far_from_zero():
    # Squares of float32 near 65535 would lose the millimetre.
    gt = np.full((100, 100), 65000, np.float32)
    assert rmse(gt + np.float32(1), gt) == 1
    assert mae(gt - np.float32(1), gt) == 1


def test_wrong_arguments_are_named():
    with pytest.raises(ArgumentError, match=r"pred must have the shape of gt = \(3,\); got \(2,\)"):
        rmse(np.ones(2), np.ones(3))
    with pytest.raises(ArgumentError, match="no pixel is valid in both"):
        rmse(np.ones(3), np.zeros(3))
    with pytest.raises(ArgumentError, match="no pixel is valid in both"):
        mae(np.ones(3), np.ones(3), np.zeros(3, bool))
