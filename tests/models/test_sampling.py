"""Interpolation, normalisation and hole filling against their formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ddfup.models import sampling
from ddfup.models.sampling import (
    fill_holes,
    image_statistics,
    interpolation,
    normalize_depth,
    normalize_locally,
    positions,
    resample,
    sample_rows_columns,
)

CPU = torch.device("cpu")


def keys(t):
    """Keys' cubic convolution kernel with a = -1/2."""
    t = abs(t)
    if t <= 1:
        return 1.5 * t**3 - 2.5 * t**2 + 1
    return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0


def triangle(t):
    return max(0.0, 1 - abs(t))


@pytest.mark.parametrize(("mode", "kernel"), [("cubic", keys), ("linear", triangle)])
@pytest.mark.parametrize("size", [(5, 7), (1, 4), (1, 1), (2, 3)])
def test_interpolation_is_the_sum_of_its_kernel_over_clamped_pixels(mode, kernel, size):
    rng = np.random.default_rng(0)
    image = rng.standard_normal(size)
    rows = np.sort(rng.uniform(-1.5, size[0] + 0.5, 6))
    columns = np.sort(rng.uniform(-1.5, size[1] + 0.5, 8))
    expected = np.zeros((6, 8))
    for i, y in enumerate(rows):
        for j, x in enumerate(columns):
            for k in range(math.floor(y) - 2, math.floor(y) + 4):
                for m in range(math.floor(x) - 2, math.floor(x) + 4):
                    value = image[min(max(k, 0), size[0] - 1), min(max(m, 0), size[1] - 1)]
                    expected[i, j] += value * kernel(y - k) * kernel(x - m)
    got = sample_rows_columns(
        torch.from_numpy(image)[None, None], torch.from_numpy(rows), torch.from_numpy(columns), mode=mode
    )
    np.testing.assert_allclose(got[0, 0].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("low", "high"), [(900, 1100), (40, 1203), (1100, 1100), (1, 1030), (33, 1031)])
@pytest.mark.parametrize("mode", ["cubic", "linear"])
@pytest.mark.parametrize("shift", [0, -7, 1040.5])
def test_large_matrices_are_made_and_multiplied_by_blocks(low, high, mode, shift, monkeypatch):
    """Wide, tall, on few and on many columns, beside the image: as the same matrix in one piece."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 2, low, 3, generator=generator, dtype=torch.float64)
    one = [(slice(None), torch.eye(3, dtype=torch.float64))]
    places = positions(0, high, 1, high / low, CPU) + shift
    blocks = interpolation(low, places, mode, torch.float64)
    monkeypatch.setattr(sampling, "_DENSE", 10**9)
    ((everything, whole),) = interpolation(low, places, mode, torch.float64)
    assert len(blocks) > 1 and everything == slice(None) and whole.shape == (high, low)
    torch.testing.assert_close(resample(image, blocks, one), whole @ image)
    torch.testing.assert_close(resample(image.mT, one, blocks), image.mT @ whole.T)


def test_statistics_of_an_image_are_numpys():
    images = torch.rand(3, 3, 9, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, std = image_statistics(images)
    np.testing.assert_allclose(mean.flatten(), images.numpy().mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(std.flatten(), images.numpy().std(axis=(1, 2, 3)))
    assert mean.shape == std.shape == (3, 1, 1, 1)


def test_linear_interpolation_agrees_with_scipy():
    rng = np.random.default_rng(1)
    image = rng.standard_normal((6, 9))
    rows, columns = rng.uniform(0, 5, 11), rng.uniform(0, 8, 7)
    grid = np.meshgrid(rows, columns, indexing="ij")
    expected = ndimage.map_coordinates(image, grid, order=1)
    tensors = (torch.from_numpy(array) for array in (image[None, None], rows, columns))
    np.testing.assert_allclose(sample_rows_columns(*tensors, mode="linear")[0, 0], expected, atol=1e-12)


@pytest.mark.parametrize("mode", ["cubic", "linear"])
def test_ramps_are_reproduced_and_pixels_hit(mode):
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(12.0), indexing="ij")
    ramp = (3 + 2 * y - 0.5 * x).double()[None, None]
    rows, columns = torch.linspace(1, 7, 25).double(), torch.linspace(1, 10, 31).double()
    expected = 3 + 2 * rows[:, None] - 0.5 * columns
    torch.testing.assert_close(sample_rows_columns(ramp, rows, columns, mode=mode)[0, 0], expected)
    noise = torch.randn(1, 2, 9, 12)
    at_pixels = sample_rows_columns(noise, torch.arange(9.0).double(), torch.arange(12.0).double(), mode=mode)
    torch.testing.assert_close(at_pixels, noise)


def test_cubic_reproduces_parabolas():
    # Keys' choice of a makes the kernel exact to second order; any other a is not.
    y = torch.arange(10.0).double()
    at = torch.linspace(2, 7, 40).double()
    got = sample_rows_columns((y**2)[None, None, :, None].expand(1, 1, 10, 4), at, torch.tensor([1.5]).double())
    torch.testing.assert_close(got[0, 0, :, 0], at**2)


@pytest.mark.parametrize("ratio", [1, 1.3, 2, 7.5])
def test_positions_share_the_outer_edges(ratio):
    length = 40
    at = positions(0, length, 1, ratio, CPU)
    # The high-resolution image begins at -1/2 of both grids and ends where the low-resolution one ends.
    assert (at[0] - 0.5 / ratio).item() == pytest.approx(-0.5)
    assert (at[-1] + 0.5 / ratio).item() == pytest.approx(length / ratio - 0.5)
    torch.testing.assert_close(positions(8, 5, 1, ratio, CPU), at[8:13])
    torch.testing.assert_close(positions(8, 4, 4, ratio, CPU), at[8:24].view(4, 4).mean(1))


def test_normalisation_gives_mean_zero_and_deviation_one():
    rng = np.random.default_rng(0)
    depth = rng.uniform(500, 4000, (3, 1, 20, 30)).astype(np.float32)
    valid = rng.uniform(size=depth.shape) > 0.3
    depth[~valid] = np.nan
    normalized, mean, std = normalize_depth(torch.from_numpy(depth), torch.from_numpy(valid))
    for i in range(3):
        values = depth[i][valid[i]].astype(np.float64)
        assert mean[i].item() == pytest.approx(values.mean(), rel=1e-6)
        assert std[i].item() == pytest.approx(values.std(), rel=1e-6)
        np.testing.assert_allclose(normalized[i].numpy()[valid[i]], (values - values.mean()) / values.std(), atol=1e-6)
    assert (normalized.numpy()[~valid] == 0).all()


def around(values, y, x):
    """Mean of the part of a 15 x 15 window that lies in the image."""
    return values[max(0, y - 7) : y + 8, max(0, x - 7) : x + 8].mean()


def test_local_normalisation_is_by_the_windows_mean_and_deviation():
    rng = np.random.default_rng(0)
    depth = rng.standard_normal((2, 1, 40, 23)).astype(np.float32)
    local, deviation = normalize_locally(torch.from_numpy(depth))
    for i in range(2):
        image = depth[i, 0].astype(np.float64)
        mean = np.array([[around(image, y, x) for x in range(23)] for y in range(40)])
        square = (image - mean) ** 2
        spread = np.sqrt([[around(square, y, x) + 1e-4 for x in range(23)] for y in range(40)])
        expected = (image - mean) / spread
        np.testing.assert_allclose(deviation[i, 0], spread, rtol=1e-5)
        np.testing.assert_allclose(local[i, 0], expected, atol=1e-5)


def test_local_normalisation_does_not_see_what_lies_far_away():
    # The left part is near and finely structured; the right one far and rough.
    near = 0.05 * torch.randn(1, 1, 20, 40)
    far = torch.cat((near, 30 + 9 * torch.randn(1, 1, 20, 40)), dim=3)
    torch.testing.assert_close(normalize_locally(far)[0][..., :26], normalize_locally(near)[0][..., :26])
    # Noise far below the deviation of the whole map does not become structure.
    assert normalize_locally(1e-4 * near)[0].abs().max() < 0.01


@pytest.mark.parametrize("value", [0.1, 1e-6, 65.535, 1e6, -3.3])
def test_a_constant_map_has_no_deviation(value):
    depth = torch.full((1, 1, 33, 57), value)
    normalized, mean, std = normalize_depth(depth, torch.ones_like(depth, dtype=torch.bool))
    assert std.item() == 0 and not normalized.any()
    assert mean.item() == depth[0, 0, 0, 0].item()


def test_normalisation_survives_a_large_offset():
    depth = torch.arange(200.0).view(1, 1, 10, 20)
    valid = torch.ones_like(depth, dtype=torch.bool)
    torch.testing.assert_close(normalize_depth(depth + 2**20, valid)[0], normalize_depth(depth, valid)[0])


def with_holes(h, w, share, seed):
    rng = np.random.default_rng(seed)
    valid = rng.uniform(size=(1, 1, h, w)) > share
    valid[0, 0, rng.integers(h), rng.integers(w)] = True
    depth = rng.integers(-100, 100, (1, 1, h, w)).astype(np.float32)
    return torch.from_numpy(depth), torch.from_numpy(valid)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([0.0, 0.1, 0.5, 0.95]), st.integers(0, 1000))
def test_filling_keeps_measurements_and_stays_in_their_range(h, w, share, seed):
    depth, valid = with_holes(h, w, share, seed)
    garbage = torch.where(valid, depth, 12345.0)
    filled = fill_holes(garbage, valid)
    assert torch.equal(filled[valid], depth[valid])
    assert filled.min() >= depth[valid].min() - 1e-3 and filled.max() <= depth[valid].max() + 1e-3
    # Affine equivariance: the weights sum to one and know nothing of the values.
    torch.testing.assert_close(fill_holes(4 * garbage + 1000, valid), 4 * filled + 1000, atol=2e-3, rtol=1e-5)


def test_filling_takes_values_from_near():
    depth = torch.zeros(1, 1, 16, 32)
    depth[..., 16:] = 100
    valid = torch.ones_like(depth, dtype=torch.bool)
    valid[..., 4:8, 4:8] = valid[..., 4:8, 24:28] = False
    assert torch.equal(fill_holes(depth, valid), depth)
    # Halfway between two measurements a hole takes something between.
    valid[:] = False
    valid[..., 0] = valid[..., -1] = True
    middle = fill_holes(depth, valid)[0, 0, :, 15:17]
    assert ((middle > 20) & (middle < 80)).all()


def test_without_measurement_nothing_is_made_up():
    depth = torch.randn(2, 1, 5, 6)
    valid = torch.zeros_like(depth, dtype=torch.bool)
    valid[1] = True
    filled = fill_holes(depth, valid)
    assert not filled[0].any()
    assert torch.equal(filled[1], depth[1])
