"""Low resolution against strided slices and PyTorch's antialiased resampling."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ddfup.degrade import DEGRADATIONS, degrade, holes, low_resolution_size, resize, sample, sensor
from ddfup.errors import ArgumentError


def ramp(height=48, width=64, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    return (1.5 + 0.01 * y + 0.02 * x + rng.uniform(0, 0.5, (height, width))).astype(np.float32)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8, 16])
def test_nearest_takes_the_upper_left_of_the_central_pixels(factor):
    depth = ramp()[:, : 64 // factor * factor]
    begin = (factor - 1) // 2
    np.testing.assert_array_equal(degrade(depth, factor, "nearest"), depth[begin::factor, begin::factor])


@pytest.mark.parametrize("factor", [1.3, 7.5, 5])
def test_nearest_at_any_ratio_is_the_pixel_nearest_to_the_cell_centre(factor):
    depth = np.arange(47 * 61, dtype=np.float32).reshape(47, 61) + 1
    low = degrade(depth, factor, "nearest")
    rows, columns = np.divmod(low - 1, 61)
    for got, count, length in ((rows[:, 0], low.shape[0], 47), (columns[0], low.shape[1], 61)):
        centre = (np.arange(count) + 0.5) * length / count - 0.5
        assert (np.abs(got - centre) <= 0.5 + 1e-5).all()


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16])
def test_smooth_kinds_agree_with_pytorch(kind, factor):
    depth = ramp()
    expected = F.interpolate(
        torch.from_numpy(depth)[None, None],
        size=low_resolution_size(depth.shape, factor),
        mode=kind,
        antialias=True,
        align_corners=False,
    )
    np.testing.assert_allclose(degrade(depth, factor, kind), expected[0, 0].numpy(), atol=2e-5)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8, 16])
def test_area_is_the_mean_of_each_cell(factor):
    depth = ramp()[:, : 64 // factor * factor]
    expected = F.avg_pool2d(torch.from_numpy(depth)[None, None], factor)[0, 0].numpy()
    np.testing.assert_allclose(degrade(depth, factor, "area"), expected, atol=1e-5)


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_the_size_is_rounded(kind):
    assert degrade(ramp(), 7.5, kind).shape == (6, 9)
    assert degrade(ramp(5, 7), 32, kind).shape == (1, 1)
    assert degrade(ramp(), 4, kind).dtype == np.float32


def test_holes_are_left_out_of_every_mean():
    depth = np.full((8, 8), 2, np.float32)
    depth[0, 0] = 0
    depth[:4, 4:] = 0
    depth[4, :3] = 0
    low = degrade(depth, 4, "area")
    # Three quarters and more of a cell measured: its mean is that of the measured; an empty cell stays empty.
    np.testing.assert_array_equal(low, [[2, 0], [2, 2]])


def test_cells_measured_by_less_than_half_are_holes():
    depth = np.full((2, 8), 3, np.float32)
    depth[:, 1:4] = 0
    depth[0, 5:7] = 0
    depth[1, 5] = 0
    np.testing.assert_array_equal(degrade(depth, 4, "area"), degrade(depth, 4, "area") * [[0, 1]])
    assert degrade(depth, 4, "area")[0, 1] == 3


@pytest.mark.parametrize("kind", ["bilinear", "bicubic", "area"])
@pytest.mark.parametrize("factor", [2, 4, 5.3])
def test_a_constant_with_holes_stays_constant(kind, factor):
    depth = np.where(np.random.default_rng(0).uniform(size=(40, 56)) < 0.2, 0, 7).astype(np.float32)
    low = degrade(depth, factor, kind)
    assert (low > 0).mean() > 0.9
    np.testing.assert_allclose(low[low > 0], 7, rtol=1e-5)


def test_no_measurement_is_written_in_several_ways():
    depth = ramp().astype(np.float64)
    depth[3, 3] = depth[10, 20] = depth[11, 50] = depth[40, 7] = 0
    other = depth.copy()
    other[3, 3], other[10, 20], other[11, 50], other[40, 7] = np.nan, np.inf, -np.inf, -1
    for kind in DEGRADATIONS:
        np.testing.assert_array_equal(degrade(other, 4, kind), degrade(depth, 4, kind))


@pytest.mark.parametrize("seed", range(12))
def test_sensor_scales_with_the_unit_and_is_reproducible(seed):
    depth = ramp(seed=seed)
    metres = degrade(depth, 4, "sensor", rng=np.random.default_rng(seed))
    again = degrade(depth, 4, "sensor", rng=np.random.default_rng(seed))
    np.testing.assert_array_equal(metres, again)
    # Powers of two scale without rounding.
    scaled = degrade(depth * 1024, 4, "sensor", rng=np.random.default_rng(seed))
    np.testing.assert_allclose(scaled, metres * 1024, rtol=1e-5)
    assert not np.array_equal(metres, degrade(depth, 4, "sensor", rng=np.random.default_rng(seed + 100)))


def test_sensor_makes_holes_and_leaves_measurements():
    depth = ramp()
    depth[:, 32:] *= 2
    shares = []
    for seed in range(60):
        low = sensor(depth, (6, 8), np.random.default_rng(seed))
        assert np.isfinite(low).all() and (low >= 0).all()
        shares.append((low > 0).mean())
        values = low[low > 0]
        assert values.min() > 0.5 * depth.min() and values.max() < 2 * depth.max()
    assert min(shares) > 0
    assert min(shares) < 0.9 and max(shares) == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 2)])
def test_sensor_never_loses_the_last_pixel(size):
    for seed in range(100):
        assert (sensor(ramp(8, 8), size, np.random.default_rng(seed)) > 0).any(), seed


def test_sensor_of_nothing_is_nothing():
    assert not degrade(np.zeros((8, 8)), 2, "sensor").any()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (12, 16), (60, 80)])
def test_holes_are_the_only_change(size):
    depth = ramp(60, 80)
    area = resize(depth, size, "area")
    shares = []
    for seed in range(20):
        low = holes(depth, size, np.random.default_rng(seed))
        assert (low > 0).any() and np.isin(low, [*area.ravel(), 0]).all()
        np.testing.assert_array_equal(low[low > 0], area[low > 0])
        shares.append((low == 0).mean())
    assert max(shares) <= 1 / 3
    if size == (60, 80):
        assert min(shares) >= 1 / 5


def test_sample_and_resize_enlarge_too():
    depth = ramp(3, 4)
    np.testing.assert_array_equal(sample(depth, (6, 8)), depth.repeat(2, 0).repeat(2, 1))
    assert resize(depth, (6, 8), "bicubic").shape == (6, 8)


@pytest.mark.parametrize(
    ("depth", "factor", "kind", "message"),
    [
        (np.ones((4, 4, 3)), 2, "area", r"depth must be \(H, W\); got \(4, 4, 3\)"),
        (np.ones((4, 4)), 0.5, "area", "factor must be at least 1; got 0.5"),
        (np.ones((4, 4)), float("nan"), "area", "factor must be at least 1; got nan"),
        (np.ones((4, 4)), 2, "cubic", "kind must be one of nearest, .*; got 'cubic'"),
    ],
)
def test_wrong_arguments_are_named(depth, factor, kind, message):
    with pytest.raises(ArgumentError, match=message):
        degrade(depth, factor, kind)
