"""What the methods start from: values, sample positions, validity."""

import numpy as np
import pytest
from PIL import Image
from scenes import scene
from scipy import ndimage

from ddfup.benchmark.low_resolution import cut_to, filled, make
from ddfup.errors import InputError


def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8, 16])
def test_point_samples_are_a_strided_slice_and_lie_where_they_were_taken(factor):
    truth = scene()[0][:, : 64 // factor * factor]
    low = make(truth, factor, "nearest", rng())
    begin = (factor - 1) // 2
    np.testing.assert_array_equal(low.depth, truth[begin::factor, begin::factor])
    np.testing.assert_array_equal(low.rows, np.arange(48)[begin::factor])
    np.testing.assert_array_equal(low.columns, np.arange(truth.shape[1])[begin::factor])
    assert low.valid.all() and low.size == truth.shape and low.factor == factor


@pytest.mark.parametrize("factor", [2.5, 7.5])
def test_point_samples_of_broken_factors_lie_where_they_were_taken(factor):
    truth = np.random.default_rng(1).uniform(1, 2, (48, 64)).astype(np.float32)
    low = make(truth, factor, "nearest", rng())
    np.testing.assert_array_equal(low.depth, truth[np.ix_(low.rows.astype(int), low.columns.astype(int))])


def test_averaged_samples_lie_at_the_centres_of_their_cells():
    low = make(scene()[0], 4, "area", rng())
    np.testing.assert_allclose(low.rows, [np.arange(4 * i, 4 * i + 4).mean() for i in range(12)])
    np.testing.assert_allclose(low.columns, [np.arange(4 * i, 4 * i + 4).mean() for i in range(16)])


def test_holes_are_told_and_filled_from_the_nearest_measurement():
    truth = scene()[0]
    truth[10:20, 16:32] = 0
    low = make(truth, 4, "nearest", rng())
    np.testing.assert_array_equal(low.valid, low.depth > 0)
    assert 0 < (~low.valid).sum() < 20
    full = filled(low.depth, low.valid)
    np.testing.assert_array_equal(full[low.valid], low.depth[low.valid])
    # Of several nearest measurements any will do.
    distance = ndimage.distance_transform_edt(~low.valid)
    ys, xs = np.nonzero(low.valid)
    for y, x in np.argwhere(~low.valid):
        near = np.hypot(ys - y, xs - x) <= distance[y, x] * 1.05
        assert full[y, x] in low.depth[ys[near], xs[near]]


def test_zero_is_a_level_of_disparity_when_lifted():
    levels = (60 * scene()[0]).round()
    levels[:24, :32] = 0
    low = make(levels, 4, "bicubic", rng(), lift=1.0)
    expected = np.array(Image.fromarray(levels).resize((16, 12), Image.Resampling.BICUBIC))
    assert low.valid.all() and expected.min() < 0, "the filter's undershoot is kept, too"
    np.testing.assert_allclose(low.depth, expected, atol=1e-4)
    assert not make(levels, 4, "bicubic", rng()).valid.all()


def test_undershoot_is_no_hole():
    truth = np.full((48, 64), 90, np.float32)
    truth[:, :32] = 0.5
    low = make(truth, 4, "bicubic", rng())
    assert low.depth.min() < 0 and low.valid.all()


def test_nothing_to_see():
    truth = np.zeros((32, 32), np.float32)
    truth[0, 0] = 1
    with pytest.raises(InputError, match="the x8 area low resolution has no measurement"):
        make(truth, 8, "area", rng())


def test_cut():
    assert cut_to((370, 463), 4) == (368, 460)
    assert cut_to((370, 463), 16.0) == (368, 448)
    assert cut_to((370, 463), 1) == cut_to((370, 463), 7.5) == (370, 463)
    with pytest.raises(InputError, match="at least 16x16 pixels for x16; got 463x15"):
        cut_to((15, 463), 16)
