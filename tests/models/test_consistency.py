"""The comparison with the measurement: its filters against the degradations, its correction against linear algebra."""

import math

import numpy as np
import pytest
import torch

from ddfup.degrade import DEGRADATIONS
from ddfup.models import sampling
from ddfup.models.consistency import Alignment, Consistency, reach, shrinking

KINDS = ("nearest", "area", "bilinear", "bicubic")


def dense(bands, length):
    """A matrix of its blocks of rows."""
    blocks = [torch.zeros(len(weights), length, dtype=weights.dtype) for _, weights in bands]
    for block, (used, weights) in zip(blocks, bands, strict=True):
        block[:, used] = weights
    return torch.cat(blocks)


def matrices(kind, low, high):
    """Weights along rows and columns of whole images, float64."""
    like = torch.zeros(1, dtype=torch.float64)
    return [dense(shrinking(kind, slice(0, a), 0, b, b / a, like), b) for a, b in zip(low, high, strict=True)]


def layer(*shares, trust):
    """A layer that estimates these shares of the kinds, and this trust in every pass, whatever it sees."""
    made = Consistency(2).double().requires_grad_(False)
    made.estimate.bias.copy_(torch.tensor([*shares, *trust]))
    made.evidence.weight.zero_()
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
def test_large_filters_are_made_by_blocks(kind, low, high, part, monkeypatch):
    """As in one piece, for the whole image and for a part of it."""
    like = torch.zeros(1, dtype=torch.float64)
    first, last = (int(share * low) for share in part)
    last = max(last, first + 1)
    start = int(part[0] * high)
    length = max(1025, int(part[1] * high) - start)
    arguments = kind, slice(first, last), start, length, high / low, like
    blocks = shrinking(*arguments)
    monkeypatch.setattr(sampling, "_DENSE", math.inf)
    ((_, whole),) = shrinking(*arguments)
    assert whole.shape == (last - first, length) and (len(blocks) > 1 or last - first <= 16)
    torch.testing.assert_close(dense(blocks, length), whole, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["nearest", "area"])
@pytest.mark.parametrize(("low", "high"), [(27, 208), (55, 424), (192, 1440), (7, 54), (480, 1440), (360, 1280)])
def test_pixels_in_the_middle_or_on_a_border_are_where_they_are_in_float32_too(kind, low, high):
    """Runtimes of exported networks may know the ratio in float32 only."""
    like = torch.zeros(1, dtype=torch.float64)
    ratios = high / low, float(np.float32(high / low))
    exact, rounded = (dense(shrinking(kind, slice(0, low), 0, high, r, like), high) for r in ratios)
    torch.testing.assert_close(rounded, exact)


CONTEXT = torch.zeros(1, 2, dtype=torch.float64)


def align(result, measured, part=(slice(None), slice(None)), pixels=None):
    ratio = tuple(a / b for a, b in zip(result.shape, measured.shape, strict=True))
    return Alignment(result[part], tuple(edge.start or 0 for edge in part), ratio, measured.shape, pixels)


def compare(made, result, measured, valid):
    """The whole result made low, and the layer's shares."""
    degraded = align(result, measured).degrade(result[None, None])
    return degraded, made.weigh(degraded, measured[None, None], valid[None, None], CONTEXT)


def correct(made, result, log_variance, measured, valid=None, part=(slice(None), slice(None))):
    """Run the layer on arrays, on the whole result or on a part of it."""
    valid = torch.ones(measured.shape, dtype=torch.bool) if valid is None else valid
    compared = compare(made, result, measured, valid)
    inputs = (image[None, None] for image in (result[part], log_variance[part], measured, valid))
    return made.correct(*inputs, CONTEXT, *compared, align(result, measured, part))[0, 0]


def some(low=(6, 8), high=(48, 64)):
    generator = torch.Generator().manual_seed(0)
    sizes = (high, high, low)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def test_steps_of_the_filters_are_mixed_by_their_shares():
    """Only the first pass makes any, and of single measurements it is the Kalman update times its step."""
    result, log_variance, measured = some((1, 1), (4, 6))
    made = layer(0.0, 0.0, 0.0, 0.0, trust=(100.0, 100.0))
    made.steps.zero_()
    made.steps[:, 0] = torch.tensor([1.0, 0.5, -0.5, 2.0])
    variance = log_variance.exp()
    ways = [matrices(kind, (1, 1), (4, 6)) for kind in KINDS]
    low = sum(rows @ result @ columns.T for rows, columns in ways) / 4
    rows, columns = ways[KINDS.index("bilinear")]
    gain = variance / (rows @ variance @ columns.T)
    expected = result + 0.75 * gain * (measured - low)
    torch.testing.assert_close(correct(made, result, log_variance, measured), expected)


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


@pytest.mark.parametrize(("low", "high"), [((22, 60), (176, 480)), ((22, 60), (165, 450)), ((18, 40), (576, 1280))])
def test_parts_beyond_their_reach_equal_the_whole(low, high):
    result, log_variance, measured = some(low, high)
    made = layer(0.3, 0.1, -0.2, 1.0, trust=(1.0, 0.0))
    whole = correct(made, result, log_variance, measured)
    margin = reach(high[0] / low[0])
    # Clamped at the image's own borders, where nothing is missing.
    top, left, bottom, right = 7, 5, high[0], min(high[1], 5 + 2 * margin + 20)
    part = (slice(top, bottom), slice(left, right))
    cut = correct(made, result, log_variance, measured, part=part)
    own = (slice(margin, None), slice(margin, None if right == high[1] else -margin))
    assert cut[own].numel() > 0
    torch.testing.assert_close(cut[own], whole[part][own])


# --- how depth was made low ---


def scene(size=(96, 128)):
    """Smooth surfaces and sharp edges."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]] / size[0]
    depth = (
        2 + 0.3 * y + 0.2 * np.sin(5 * x) + (x + 0.3 * np.sin(4 * y) > 0.7) + 0.7 * (np.hypot(x - 0.4, y - 0.5) < 0.3)
    )
    return torch.from_numpy(depth)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("low", "top", "rows"), [((12, 16), 0, slice(0, 12)), ((13, 17), 24, slice(6, 9))])
def test_a_part_is_made_low_as_the_whole(kind, low, top, rows):
    image = scene().float()
    part = (slice(top, None), slice(None))
    made = align(image, torch.empty(low), part, (rows, slice(3, low[1]))).degrade(image[part][None, None])
    expected = DEGRADATIONS[kind](image.numpy(), low, np.random.default_rng(0))[rows, 3:]
    np.testing.assert_allclose(made[0, KINDS.index(kind)], expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low", [(24, 32), (12, 16), (7, 9)])
def test_the_filter_that_was_used_is_found(kind, low):
    """Also where the result is off by a hundredth of the depth's deviation."""
    truth = scene()
    measured = torch.tensor(DEGRADATIONS[kind](truth.numpy().astype(np.float32), low, np.random.default_rng(0)))
    result = truth + 0.01 * truth.std() * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    made = Consistency(2).double().requires_grad_(False)
    _, shares = compare(made, result, measured.double(), torch.ones(low, dtype=torch.bool))
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(1, dtype=torch.float64))
    assert shares[0, KINDS.index(kind)] > 0.9


def test_what_the_context_says_counts_beside_the_evidence():
    truth = scene()
    measured = truth[3::8, 3::8]
    made = Consistency(2).double().requires_grad_(False)
    valid = torch.ones(measured.shape, dtype=torch.bool)
    before = compare(made, truth, measured, valid)[1].log()
    made.estimate.bias[1] += 3
    after = compare(made, truth, measured, valid)[1].log()
    torch.testing.assert_close((after - before)[0, 1] - (after - before)[0, 0], torch.tensor(3.0, dtype=torch.float64))


def test_holes_are_no_evidence():
    result, _, measured = some()
    made = Consistency(2).double().requires_grad_(False)
    hole = torch.rand(measured.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    shares = compare(made, result, measured, ~hole)[1]
    torch.testing.assert_close(compare(made, result, torch.where(hole, 1e3, measured), ~hole)[1], shares)
    # All holes: what the context says alone, here nothing.
    shares = compare(made, result, measured, torch.zeros_like(hole))[1]
    torch.testing.assert_close(shares, torch.full((1, 4), 0.25, dtype=torch.float64))


def test_evidence_is_of_the_amounts_and_not_of_the_size():
    """Of an image that is repeated it is the same, and of differences that are all as many times as large."""
    made = Consistency(2).double().requires_grad_(False)
    degraded = 1 + torch.rand((1, 4, 8, 10), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measured, valid = torch.zeros(1, 1, 8, 10, dtype=torch.float64), torch.ones(1, 1, 8, 10, dtype=torch.bool)
    one = made.weigh(degraded, measured, valid, CONTEXT)
    assert one.std() > 0.01
    repeated = (image.repeat(1, 1, 4, 4) for image in (degraded, measured, valid))
    torch.testing.assert_close(made.weigh(*repeated, CONTEXT), one)
    torch.testing.assert_close(made.weigh(30 * degraded, measured, valid, CONTEXT), one, atol=1e-3, rtol=0)


def test_the_estimate_of_the_filter_does_not_bend_the_result():
    made = Consistency(2)
    degraded = torch.rand(1, 4, 6, 8, requires_grad=True)
    shares = made.weigh(degraded, torch.zeros(1, 1, 6, 8), torch.ones(1, 1, 6, 8, dtype=torch.bool), CONTEXT.float())
    shares[:, 0].sum().backward()
    assert degraded.grad is None and made.evidence.weight.grad.abs().sum() > 0
