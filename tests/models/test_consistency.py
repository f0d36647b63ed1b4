"""The comparison with the measurement: its filters against the degradations, its correction against linear algebra."""

import numpy as np
import pytest
import torch

from ddfup.degrade import DEGRADATIONS
from ddfup.models.consistency import Consistency, reach, shrinking, shrinking_bands

KINDS = ("nearest", "area", "bilinear", "bicubic")


def matrices(kind, low, high):
    """Weights along rows and columns of whole images, float64."""
    like = torch.zeros(1, dtype=torch.float64)
    return [shrinking(kind, 0, a, 0, b, b / a, like) for a, b in zip(low, high, strict=True)]


def layer(*shares, trust):
    """A layer that estimates these shares of the kinds, and this trust in every pass, whatever it sees."""
    made = Consistency(2).double().requires_grad_(False)
    made.estimate.bias.copy_(torch.tensor([*shares, *trust]))
    return made


def sure(kind, trust=(50.0, 50.0)):
    return layer(*(100.0 * (name == kind) for name in KINDS), trust=trust)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low", [(12, 15), (6, 8), (7, 9), (1, 1), (48, 60), (3, 60)])
def test_the_filters_are_those_of_the_degradations(kind, low):
    image = np.random.default_rng(0).uniform(1, 2, (48, 60)).astype(np.float32)
    rows, columns = matrices(kind, low, image.shape)
    expected = DEGRADATIONS[kind](image, low, np.random.default_rng(0))
    np.testing.assert_allclose(rows @ torch.from_numpy(image).double() @ columns.T, expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("low", "high"), [(150, 1200), (1100, 1100), (37, 1111), (1, 1030), (800, 1210)])
@pytest.mark.parametrize("part", [(0, 1), (0.31, 0.9)])
def test_large_filters_are_made_by_blocks(kind, low, high, part):
    """As in one piece, for the whole image and for a part of it."""
    like = torch.zeros(1, dtype=torch.float64)
    first, last = (int(share * low) for share in part)
    last = max(last, first + 1)
    start = int(part[0] * high)
    length = max(1025, int(part[1] * high) - start)
    whole = shrinking(kind, first, last - first, start, length, high / low, like)
    blocks = shrinking_bands(kind, slice(first, last), start, length, high / low, like)
    found = torch.zeros_like(whole)
    row = 0
    for used, weights in blocks:
        found[row : row + len(weights), used] = weights
        row += len(weights)
    assert row == last - first
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["nearest", "area"])
@pytest.mark.parametrize(("low", "high"), [(27, 208), (55, 424), (192, 1440), (7, 54), (480, 1440), (360, 1280)])
def test_pixels_in_the_middle_or_on_a_border_are_where_they_are_in_float32_too(kind, low, high):
    """Runtimes of exported networks may know the ratio in float32 only."""
    like = torch.zeros(1, dtype=torch.float64)
    exact, rounded = (shrinking(kind, 0, low, 0, high, r, like) for r in (high / low, float(np.float32(high / low))))
    torch.testing.assert_close(rounded, exact)


def correct(made, result, log_variance, measured, valid=None, origin=(0, 0), size=None):
    """Run the layer on arrays; ``size`` of the whole high resolution where the result is a part of it."""
    context = torch.zeros(1, 2, dtype=torch.float64)
    ratio = tuple(a / b for a, b in zip(size or result.shape, measured.shape, strict=True))
    valid = torch.ones(measured.shape, dtype=torch.bool) if valid is None else valid
    inputs = (image[None, None] for image in (result, log_variance, measured, valid))
    return made(*inputs, context, origin=origin, ratio=ratio)[0, 0]


def some(low=(6, 8), high=(48, 64)):
    generator = torch.Generator().manual_seed(0)
    sizes = (high, high, low)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize("kind", KINDS)
def test_what_agrees_with_the_measurement_stays(kind):
    result, log_variance, _ = some()
    rows, columns = matrices(kind, (6, 8), result.shape)
    torch.testing.assert_close(correct(sure(kind), result, log_variance, rows @ result @ columns.T), result)


def test_repeated_it_brings_the_measurement_back():
    result, log_variance, measured = some()
    rows, columns = matrices("area", (6, 8), result.shape)
    before = (rows @ result @ columns.T - measured).abs().max()
    for _ in range(30):
        result = correct(sure("area"), result, log_variance.clamp(-1, 1), measured)
    assert (rows @ result @ columns.T - measured).abs().max() < 1e-3 * before


def test_one_measurement_of_one_pixel_is_the_kalman_update():
    # One low-resolution pixel, so that nothing overlaps: x + v w (y - w x) / (w v), with the trust as a factor.
    # The second pass is not trusted.
    result, log_variance, measured = some((1, 1), (4, 6))
    variance = log_variance.exp()
    rows, columns = matrices("area", (1, 1), (4, 6))
    triangle_rows, triangle_columns = matrices("bilinear", (1, 1), (4, 6))
    gain = variance / (triangle_rows @ variance @ triangle_columns.T)
    expected = result + 0.5 * gain * (measured - rows @ result @ columns.T)
    torch.testing.assert_close(correct(sure("area", trust=(0.0, -100.0)), result, log_variance, measured), expected)


def test_corrections_go_where_the_network_is_unsure():
    result, log_variance, measured = some()
    # In every other column, so that each low-resolution pixel has both kinds.
    log_variance = torch.full_like(log_variance, -3)
    log_variance[:, ::2] = 3
    change = (correct(sure("area"), result, log_variance, measured) - result).abs()
    assert change[:, ::2].mean() > 100 * change[:, 1::2].mean() > 0


def test_holes_and_distrusted_measurements_change_nothing():
    result, log_variance, measured = some()
    hole = torch.zeros(measured.shape, dtype=torch.bool)
    assert torch.equal(correct(sure("bicubic"), result, log_variance, measured, hole), result)
    torch.testing.assert_close(correct(sure("bicubic", trust=(-100.0, -100.0)), result, log_variance, measured), result)


@pytest.mark.parametrize(("low", "high"), [((14, 40), (112, 320)), ((14, 40), (105, 300)), ((12, 24), (384, 768))])
def test_parts_beyond_their_reach_equal_the_whole(low, high):
    result, log_variance, measured = some(low, high)
    made = layer(0.3, 0.1, -0.2, 1.0, trust=(1.0, 0.0))
    whole = correct(made, result, log_variance, measured)
    margin = reach(high[0] / low[0])
    # Clamped at the image's own borders, where nothing is missing.
    top, left, bottom, right = 7, 5, high[0], min(high[1], 5 + 2 * margin + 20)
    part = (slice(top, bottom), slice(left, right))
    cut = correct(made, result[part], log_variance[part], measured, origin=(top, left), size=high)
    own = (slice(margin, None), slice(margin, None if right == high[1] else -margin))
    assert cut[own].numel() > 0
    torch.testing.assert_close(cut[own], whole[part][own])
