import numpy as np
import pytest

from ddfup import preview


def ramp(height, width):
    return np.broadcast_to(np.linspace(1, 5, width, dtype=np.float32), (height, width)).copy()


def test_one_scale_for_input_and_result():
    low = ramp(6, 8)
    picture = preview.side_by_side(np.full((240, 320, 3), 200, np.uint8), low, ramp(240, 320), label="m")
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    columns = np.flatnonzero((picture[100] == 200).all(axis=1))
    assert len(columns) == 320, "the guide is shown as it is"
    gap = columns[0]
    first, second = columns[-1] + 1 + gap, columns[-1] + 1 + 2 * gap + 320
    given, result = (
        picture[100, first : first + 320].astype(int),
        picture[100, second : second + 320].astype(int),
    )
    # Every block of the input has the colour that the result has where its depth is the same.
    for block in range(8):
        colours = given[block * 40 : (block + 1) * 40]
        assert (colours == colours[0]).all(), "input pixels are sharp blocks"
        same = np.abs(ramp(1, 320)[0] - low[0, block]).argmin()
        assert np.abs(colours[0] - result[same]).max() <= 4
    assert given[0].sum() > given[-1].sum(), "near is bright"


def test_holes_are_grey_and_do_not_move_the_scale():
    depth = ramp(60, 80)
    holes = depth.copy()
    holes[10:20, 10:20] = np.nan
    scale = preview.depth_scale(holes, label="m")
    painted = scale.paint(holes)
    grey = painted[10:20, 10:20].astype(int)
    assert (grey == grey[0, 0]).all() and np.ptp(grey[0, 0]) < 12
    assert not (painted[30:] == painted[10, 10]).all(axis=-1).any()
    assert (scale.low, scale.high) == pytest.approx((1.08, 4.92), abs=0.05)


def test_outliers_do_not_wash_the_picture_out():
    depth = ramp(60, 80)
    depth[0, :5] = 1e6
    assert preview.depth_scale(depth, label="m").high < 6


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (1500, 2000)])
def test_any_size_gives_a_picture_of_bounded_size(shape):
    depth = np.full(shape, 2.0, np.float32)
    guide = np.zeros((*shape, 3), np.uint16)
    picture = preview.side_by_side(guide, depth[:1, :1], depth, label="")
    assert 0 < picture.shape[0] <= 1100 and 0 < picture.shape[1] <= 3300


def test_all_invalid_is_drawn_too():
    nothing = np.full((30, 40), np.nan, np.float32)
    assert preview.side_by_side(np.zeros((30, 40, 3), np.uint8), nothing, nothing, label="m").size > 0


def test_errors_share_the_scale_of_the_first():
    truth = ramp(240, 320)
    truth[:5] = 0
    picture = preview.errors(truth, {"large": truth + 1, "none": truth}, label="m")
    middle = picture[120]
    bright = (middle == middle[20]).all(axis=-1)
    assert bright[20:300].all() and not bright[345:640].any()


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.99, 1.01), (3.2, 187.0), (0.0, 1e-6), (1000.0, 65535.0)])
def test_ticks_are_few_round_and_inside(low, high):
    scale = preview.Scale(low, high, np.zeros((256, 3), np.uint8), "m")
    ticks = preview._ticks(scale)
    assert 2 <= len(ticks) <= 7
    for share, text in ticks:
        assert -1e-9 <= share <= 1 + 1e-9
        assert float(text) == pytest.approx(low + share * (high - low), abs=0.02 * (high - low))
    assert len({text for _, text in ticks}) == len(ticks)
