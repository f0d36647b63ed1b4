"""Each classical method against an oracle of other making: Pillow, SciPy, plain loops, dense linear algebra."""

import itertools
import math

import cv2
import numpy as np
import pytest
from PIL import Image
from scenes import scene
from scipy.interpolate import RegularGridInterpolator

from ddfup.benchmark import baselines
from ddfup.benchmark.baselines import BASELINES
from ddfup.benchmark.low_resolution import LowResolution, make
from ddfup.metrics import rmse

PILLOW = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
FILTERS = ("guided-filter", "joint-bilateral", "fast-global-smoother")


def low_of(factor=4, kind="bicubic", size=(48, 64), seed=0):
    truth, guide = scene(*size, seed=seed)
    return make(truth, factor, kind, np.random.default_rng(0)), truth, guide


def small(height=9, width=11, seed=0):
    generator = np.random.default_rng(seed)
    return generator.uniform(1, 4, (height, width)), generator.uniform(0, 1, (height, width, 3))


# --- interpolation ---


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 7.5, 16])
@pytest.mark.parametrize("name", PILLOW)
def test_interpolation_of_averages_is_pillows(name, factor):
    low, _, guide = low_of(factor, "area")
    expected = np.array(Image.fromarray(low.depth).resize((64, 48), PILLOW[name]))
    np.testing.assert_allclose(BASELINES[name](low, guide), expected, rtol=1e-5)


def keys(distance):
    d = abs(distance)
    if d < 1:
        return 1.5 * d**3 - 2.5 * d**2 + 1
    return -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_bicubic_of_point_samples_has_their_phase(factor):
    truth, guide = scene(24, 48)
    low = make(truth, factor, "nearest", np.random.default_rng(0))
    got = BASELINES["bicubic"](low, guide)
    begin, (rows, columns) = (factor - 1) // 2, low.depth.shape
    for y, x in itertools.product(range(0, 24, 5), range(0, 48, 3)):
        total = mass = 0.0
        for i, j in itertools.product(range(rows), range(columns)):
            weight = keys((y - begin) / factor - i) * keys((x - begin) / factor - j)
            total, mass = total + weight * float(low.depth[i, j]), mass + weight
        assert got[y, x] == pytest.approx(total / mass, rel=1e-9), (y, x)
    np.testing.assert_allclose(got[begin::factor, begin::factor], low.depth, rtol=1e-12)


@pytest.mark.parametrize("factor", [2, 2.5, 4, 7.5])
def test_bilinear_of_point_samples_is_scipys_between_them(factor):
    low, _, guide = low_of(factor, "nearest")
    got = BASELINES["bilinear"](low, guide)
    inside = [np.arange(p[0], p[-1] + 1) for p in (low.rows, low.columns)]
    expected = RegularGridInterpolator((low.rows, low.columns), low.depth.astype(np.float64))(
        np.stack(np.meshgrid(*inside, indexing="ij"), axis=-1)
    )
    np.testing.assert_allclose(got[np.ix_(*(axis.astype(int) for axis in inside))], expected, rtol=1e-9)


@pytest.mark.parametrize("factor", [2, 5, 7.5, 8])
def test_nearest_takes_a_nearest_sample(factor):
    low, _, guide = low_of(factor, "nearest")
    got = BASELINES["nearest"](low, guide)
    # Within a cell: where ratios are broken, the cells' borders are a matter of definition, so half a pixel more.
    reach = max(np.diff(low.rows).max(), np.diff(low.columns).max()) / 2 + 0.5
    for y, x in itertools.product(range(48), range(64)):
        near_y, near_x = np.abs(low.rows - y) <= reach, np.abs(low.columns - x) <= reach
        near_y[[0, -1]] |= y <= low.rows[0], y >= low.rows[-1]
        near_x[[0, -1]] |= x <= low.columns[0], x >= low.columns[-1]
        assert np.float32(got[y, x]) in low.depth[np.ix_(near_y, near_x)]


def test_one_sample_fills_the_image():
    low = LowResolution(np.array([[7]], np.float32), np.array([[True]]), np.array([3.5]), np.array([3.5]), (8, 8), 8)
    for name in PILLOW:
        np.testing.assert_array_equal(BASELINES[name](low, np.zeros((8, 8, 3), np.uint8)), np.full((8, 8), 7.0))


def test_inpainting_fills_a_slope_better_than_the_nearest_value():
    y, x = np.mgrid[0:48, 0:64].astype(np.float32)
    truth = 2 + 0.02 * x + 0.01 * y
    low = make(truth, 4, "area", np.random.default_rng(0))
    low.valid[4:8, 5:10] = False
    hole = ~low.valid.repeat(4, 0).repeat(4, 1)
    low.depth[~low.valid] = 1e6
    errors = {name: np.abs(BASELINES[name](low, None) - truth) for name in ("bicubic", "inpainting")}
    assert errors["inpainting"][hole].mean() < 0.8 * errors["bicubic"][hole].mean()
    # Two low-resolution pixels away from the hole both do the same.
    far = cv2.dilate(hole.astype(np.uint8), np.ones((17, 17), np.uint8)) == 0
    np.testing.assert_array_equal(errors["inpainting"][far], errors["bicubic"][far])


# --- filters ---


@pytest.mark.parametrize(("radius", "epsilon"), [(1, 1e-3), (2, 1e-2), (20, 1e-4)])
def test_guided_filter_is_the_mean_of_ridge_regressions(radius, epsilon):
    image, guide = small()
    height, width = image.shape
    models = np.empty((height, width, 4))
    windows = {}
    for y, x in itertools.product(range(height), range(width)):
        window = np.s_[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
        windows[y, x] = window
        colours, values = guide[window].reshape(-1, 3), image[window].ravel()
        # Ridge regression as ordinary least squares: one more row per slope, none for the offset.
        penalty = np.hstack([math.sqrt(epsilon * len(values)) * np.eye(3), np.zeros((3, 1))])
        left = np.vstack([np.hstack([colours, np.ones((len(values), 1))]), penalty])
        models[y, x] = np.linalg.lstsq(left, np.append(values, [0, 0, 0]), rcond=None)[0]
    expected = np.array(
        [
            [models[windows[y, x]].reshape(-1, 4).mean(axis=0) @ [*guide[y, x], 1] for x in range(width)]
            for y in range(height)
        ]
    )
    got = baselines.guided_filter(image, guide, radius=radius, epsilon=epsilon)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.parametrize("step", [1, 3])
def test_joint_bilateral_filter_is_a_weighted_mean(step):
    image, guide = small()
    height, width = image.shape
    got = baselines.joint_bilateral_filter(image, guide, step=step, sigma_space=2.5, sigma_colour=0.4, reach=2)
    for y, x in itertools.product(range(height), range(width)):
        total = mass = 0.0
        for i, j in itertools.product(range(-2, 3), repeat=2):
            v, u = y + i * step, x + j * step
            if 0 <= v < height and 0 <= u < width:
                colour = sum((guide[y, x, c] - guide[v, u, c]) ** 2 for c in range(3))
                weight = math.exp(-colour / (2 * 0.4**2)) * math.exp(-((v - y) ** 2 + (u - x) ** 2) / (2 * 2.5**2))
                total, mass = total + weight * image[v, u], mass + weight
        assert got[y, x] == pytest.approx(total / mass, rel=1e-10)


def test_fast_global_smoother_solves_its_equations():
    image, guide = small()
    expected = image.copy()
    for number in (1, 2, 3):
        share = 5.0 * 1.5 * 4 ** (3 - number) / (4**3 - 1)
        # The image's rows first, then its columns: transposed, the same again.
        for _ in range(2):
            for row in range(len(expected)):
                count = expected.shape[1]
                matrix = np.eye(count)
                for i in range(count - 1):
                    weight = share * math.exp(-np.linalg.norm(guide[row, i] - guide[row, i + 1]) / 0.2)
                    matrix[[i, i + 1], [i, i + 1]] += weight
                    matrix[[i, i + 1], [i + 1, i]] -= weight
                expected[row] = np.linalg.solve(matrix, expected[row])
            expected, guide = expected.T.copy(), guide.transpose(1, 0, 2)
    image, guide = small()
    got = baselines.fast_global_smoother(image, guide, strength=5.0, sigma=0.2)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


@pytest.mark.parametrize("kind", ["bicubic", "nearest"])
@pytest.mark.parametrize("name", FILTERS)
def test_filters_use_the_guide(name, kind):
    low, truth, guide = low_of(8, kind, (96, 128))
    plain = rmse(BASELINES["bicubic"](low, guide), truth)
    assert rmse(BASELINES[name](low, guide), truth) < 0.97 * plain
    if name == "joint-bilateral":
        assert rmse(BASELINES[name](low, np.full_like(guide, 99)), truth) > plain


# --- all ---


@pytest.mark.parametrize("factor", [1, 4, 7.5])
@pytest.mark.parametrize("name", BASELINES)
def test_no_method_depends_on_unit_or_origin(name, factor):
    low, _, guide = low_of(factor)
    other = LowResolution(1000 * low.depth + 500, low.valid, low.rows, low.columns, low.size, factor)
    result = BASELINES[name](low, guide)
    assert result.shape == (48, 64) and np.isfinite(result).all()
    np.testing.assert_allclose(BASELINES[name](other, guide), 1000 * result + 500, rtol=1e-5)
    wide = guide.astype(np.uint16) * 257
    np.testing.assert_allclose(BASELINES[name](low, wide), result, rtol=1e-12)


@pytest.mark.parametrize("name", BASELINES)
def test_holes_never_bleed(name):
    truth, guide = scene()
    truth[10:30, 20:40] = 0
    low = make(truth, 4, "nearest", np.random.default_rng(0))
    assert not low.valid.all()
    result = BASELINES[name](low, guide)
    measured = low.depth[low.valid]
    margin = 0.2 * (measured.max() - measured.min())
    assert measured.min() - margin < result.min() and result.max() < measured.max() + margin


@pytest.mark.parametrize("name", BASELINES)
def test_threads_change_nothing(name):
    low, _, guide = low_of(4, size=(200, 240))
    before = cv2.getNumThreads()
    try:
        results = []
        for threads in (1, 2):
            cv2.setNumThreads(threads)
            results.append(BASELINES[name](low, guide))
    finally:
        cv2.setNumThreads(before)
    np.testing.assert_array_equal(*results)
