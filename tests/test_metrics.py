"""Metrics against plain loops, scikit-image and numbers worked out by hand, and what they leave out."""

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ddfup.errors import ArgumentError
from ddfup.metrics import METRICS, Thresholds, describe, evaluate, mean_figures, near_edges, rmse


def scene(seed=0, size=(23, 31), holes=True):
    """A slope with a nearer box, noise on the prediction, holes in both."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    truth = 2 + 0.01 * y + 0.02 * x
    truth[5:14, 8:20] = 1.1
    prediction = truth + rng.normal(0, 0.08, size)
    if holes:
        truth[rng.random(size) < 0.1] = 0
        truth[2, 3], truth[4, 4], truth[6, 6] = np.nan, -1, np.inf
        prediction[rng.random(size) < 0.1] = np.nan
    return prediction.astype(np.float32), truth.astype(np.float32)


def by_loops(prediction, truth, valid, max_depth):
    """Every measure but SSIM as its definition says, pixel by pixel."""
    height, width = truth.shape
    measured = [[math.isfinite(t) and t > 0 for t in row] for row in truth.tolist()]
    edges = set()
    for y in range(height):
        for x in range(width):
            for b, a in ((y, x + 1), (y + 1, x)):
                if b < height and a < width and measured[y][x] and measured[b][a]:
                    one, two = float(truth[y, x]), float(truth[b, a])
                    if abs(one - two) > 0.05 * min(one, two):
                        edges |= {(y, x), (b, a)}
    pairs, at_edges, with_truth = [], [], 0
    for y in range(height):
        for x in range(width):
            t, p = float(truth[y, x]), float(prediction[y, x])
            if not measured[y][x] or not valid[y, x] or t > max_depth:
                continue
            with_truth += 1
            if not math.isfinite(p):
                continue
            pairs.append((p, t))
            if any((y - b) ** 2 + (x - a) ** 2 <= 9 for b, a in edges):
                at_edges.append((p, t))
    n = len(pairs)
    mse = sum((p - t) ** 2 for p, t in pairs) / n
    ratios = [max(p / t, t / p) for p, t in pairs]
    peak = max(t for _, t in pairs) - min(t for _, t in pairs)
    return {
        "rmse": mse**0.5,
        "mae": sum(abs(p - t) for p, t in pairs) / n,
        "abs_rel": sum(abs(p - t) / t for p, t in pairs) / n,
        "delta1": sum(r < 1.25 for r in ratios) / n,
        "delta2": sum(r < 1.5625 for r in ratios) / n,
        "delta3": sum(r < 1.953125 for r in ratios) / n,
        "bad_5cm": sum(abs(p - t) > 0.05 for p, t in pairs) / n,
        "bad_10cm": sum(abs(p - t) > 0.1 for p, t in pairs) / n,
        "bad_5pct": sum(abs(p - t) / t > 0.05 for p, t in pairs) / n,
        "edge_rmse": (sum((p - t) ** 2 for p, t in at_edges) / len(at_edges)) ** 0.5,
        "psnr": 10 * math.log10(peak**2 / mse),
        "valid_fraction": n / with_truth,
    }


@pytest.mark.parametrize("seed", range(4))
def test_every_measure_is_its_definition(seed):
    prediction, truth = scene(seed)
    prediction *= 1 + 0.5 * (np.arange(31) > 22)  # some ratios beyond each delta
    valid = np.random.default_rng(seed).random(truth.shape) < 0.9
    figures = evaluate(prediction, truth, valid=valid, max_depth=2.6)
    expected = by_loops(prediction, truth, valid, 2.6)
    assert set(figures) == set(METRICS) == {*expected, "ssim"}
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-9), name
    assert figures["rmse"] == rmse(prediction, truth, valid & ~(truth > 2.6))


@pytest.mark.parametrize("seed", range(3))
def test_psnr_and_ssim_are_those_of_scikit_image(seed):
    prediction, truth = (each.astype(np.float64) for each in scene(seed, holes=False))
    span = float(truth.max() - truth.min())
    figures = evaluate(prediction, truth)
    assert figures["psnr"] == pytest.approx(peak_signal_noise_ratio(truth, prediction, data_range=span))
    expected = structural_similarity(
        truth, prediction, data_range=span, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert figures["ssim"] == pytest.approx(expected, rel=1e-9)


def test_ssim_looks_past_holes():
    prediction, truth = scene(0)
    counted = np.isfinite(truth) & (truth > 0) & np.isfinite(prediction)
    span = float(truth[counted].max()) - float(truth[counted].min())
    radius, likeness = 5, []
    offsets = range(-radius, radius + 1)
    gauss = {(j, i): math.exp(-(j * j + i * i) / (2 * 1.5**2)) for j in offsets for i in offsets}
    for y in range(radius, truth.shape[0] - radius):
        for x in range(radius, truth.shape[1] - radius):
            if not counted[y, x]:
                continue
            window = [
                (g, float(prediction[y + j, x + i]), float(truth[y + j, x + i]))
                for (j, i), g in gauss.items()
                if counted[y + j, x + i]
            ]
            total = sum(g for g, _, _ in window)
            p, t = (sum(w[0] * w[k] for w in window) / total for k in (1, 2))
            vp, vt = (sum(w[0] * (w[k] - m) ** 2 for w in window) / total for k, m in ((1, p), (2, t)))
            cov = sum(g * (a - p) * (b - t) for g, a, b in window) / total
            c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
            likeness.append((2 * p * t + c1) * (2 * cov + c2) / ((p * p + t * t + c1) * (vp + vt + c2)))
    assert evaluate(prediction, truth)["ssim"] == pytest.approx(sum(likeness) / len(likeness), rel=1e-9)


def test_what_is_not_defined_is_not_a_number():
    figures = evaluate(np.full((12, 12), 2.1), np.full((12, 12), 2.0))
    assert [name for name, value in figures.items() if not math.isfinite(value)] == ["edge_rmse", "psnr", "ssim"]
    small = np.array([[1.0, 2.0, 3.0]])
    assert math.isnan(evaluate(small, small)["ssim"])
    assert evaluate(small, small)["psnr"] == math.inf


def test_unmeasured_and_unpredicted_pixels_are_left_out():
    truth = np.array([[2.0, 0.0, -1.0, np.nan, np.inf, 2.0, 2.0]])
    prediction = np.array([[2.5, 9.0, 9.0, 9.0, 9.0, np.nan, 1.5]])
    figures = evaluate(prediction, truth)
    assert (figures["rmse"], figures["mae"], figures["abs_rel"]) == (0.5, 0.5, 0.25)
    assert figures["valid_fraction"] == 2 / 3
    assert evaluate(prediction, truth, valid=np.array([[True] * 6 + [False]]))["valid_fraction"] == 0.5
    prediction[0, 6] = 9
    assert rmse(prediction, truth) > 0.5
    assert rmse(prediction, truth, np.array([[True] * 6 + [False]])) == 0.5


def test_a_prediction_below_zero_is_wrong_not_missing():
    figures = evaluate(np.array([[-3.0, 0.0, 1.0]]), np.ones((1, 3)))
    assert figures["valid_fraction"] == 1
    assert figures["delta3"] == figures["delta1"] == pytest.approx(1 / 3)


def test_units_scale():
    prediction, truth = scene(1)
    metres = evaluate(prediction, truth)
    large = evaluate(1000 * prediction, 1000 * truth, thresholds=Thresholds(bad=(50, 100), unit=""))
    for one, two, meaning in zip(metres.values(), large.values(), METRICS.values(), strict=True):
        assert two == pytest.approx(one * (1000 if meaning.unit == "depth" else 1), rel=1e-4)


def test_thresholds_name_their_measures():
    lines = Thresholds(bad=(0.005, 1.0), bad_relative=(0.01,), edge_jump=0.5, edge_distance=1)
    prediction, truth = scene(2)
    figures = evaluate(prediction, truth, thresholds=lines)
    assert list(figures) == list(describe(lines))
    assert list(figures)[6:9] == ["bad_0.5cm", "bad_100cm", "bad_1pct"]
    assert figures["bad_0.5cm"] > figures["bad_1pct"] > figures["bad_100cm"] == 0
    assert "1 px" in describe(lines)["edge_rmse"].description
    assert "bad_3" in describe(Thresholds(bad=(1, 3), unit=""))
    for wrong in ({"bad": (0.0,)}, {"bad_relative": (math.nan,)}, {"edge_jump": -1.0}, {"bad": (0.1, 0.1)}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            Thresholds(**wrong)
    with pytest.raises(ArgumentError, match="edge_distance must be 0 to 100 pixels; got -1"):
        Thresholds(edge_distance=-1)


def test_an_error_of_exactly_the_limit_is_not_above_it():
    millimetres = np.arange(500, 9000, dtype=np.float64).reshape(10, -1)
    truth, prediction = (np.float32(each / 1000) for each in (millimetres, millimetres + 50))
    assert evaluate(prediction, truth)["bad_5cm"] == 0
    assert evaluate(np.float32((millimetres + 51) / 1000), truth)["bad_5cm"] == 1


def test_edges_need_two_measured_neighbours():
    truth = np.array([[1.0, 0.0, 3.0, 3.1, np.nan], [1.04, 1.04, 0.0, 3.2, 3.4]])
    # 3.2 to 3.4 is 6 % of the nearer; across holes nothing is known.
    expected = np.zeros((2, 5), bool)
    expected[1, 3:] = True
    assert np.array_equal(near_edges(truth, distance=0), expected)


def test_rmse_is_exact_for_float32_far_from_zero():
    # Squares of float32 near 65535 would lose the millimetre.
    truth = np.full((100, 100), 65000, np.float32)
    assert rmse(truth + np.float32(1), truth) == 1
    assert evaluate(truth - np.float32(1), truth)["mae"] == 1


def test_means_skip_what_is_not_defined():
    rows = [{"psnr": math.inf, "ssim": math.nan}, {"psnr": 20.0, "ssim": math.nan}, {"psnr": 30.0, "ssim": math.nan}]
    means = mean_figures(rows)
    assert means["psnr"] == 25
    assert math.isnan(means["ssim"])
    assert mean_figures([]) == {}


def test_every_measure_says_what_it_is():
    for name, meaning in METRICS.items():
        assert meaning.label and meaning.description.endswith("."), name
        assert meaning.better == ("higher" if name[:5] in ("delta", "psnr", "ssim", "valid") else "lower")


def test_wrong_arguments_are_named():
    with pytest.raises(ArgumentError, match=r"pred must have the shape of gt = \(3,\); got \(2,\)"):
        rmse(np.ones(2), np.ones(3))
    with pytest.raises(ArgumentError, match=r"valid must have the shape of gt = \(3,\); got \(2,\)"):
        rmse(np.ones(3), np.ones(3), np.ones(2, bool))
    with pytest.raises(ArgumentError, match="no pixel is valid in both"):
        rmse(np.ones(3), np.zeros(3))
    with pytest.raises(ArgumentError, match="no pixel is valid in both"):
        evaluate(np.ones((3, 3)), np.ones((3, 3)), valid=np.zeros((3, 3), bool))
    with pytest.raises(ArgumentError, match=r"truth must be \(H, W\); got shape \(3,\)"):
        evaluate(np.ones(3), np.ones(3))
    with pytest.raises(ArgumentError, match="max_depth must be above 0; got -1"):
        evaluate(np.ones((3, 3)), np.ones((3, 3)), max_depth=-1)
