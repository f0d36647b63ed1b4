"""How low-resolution depth comes onto a network's grids: normalisation, hole filling, cubic resampling.

Every function here is linear in depth with weights that sum to one, or returns the numbers to undo it, so
that a network built on it is exactly equivariant: ``f(a * depth + b) = a * f(depth) + b`` for a > 0.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Keys' cubic convolution with the parameter of the image libraries (PIL), sharper than bilinear without
# strong overshoot.
_KEYS_A = -0.5
# Window of the local normalisation, in low-resolution pixels, and the least deviation, in those of the whole
# map: what is flatter is noise, not structure.
_WINDOW = 15
_FLOOR = 0.01
# Matrices up to this side are made and multiplied whole; larger ones in blocks of so many pixels.
_DENSE = 256
_BAND = 128

# A matrix of weights, of which most are zero, in blocks of rows: the columns that each uses, and their weights.
Bands = list[tuple[slice, Tensor]]


def full_precision(image: Tensor) -> contextlib.AbstractContextManager[object]:
    """Leave autocast for a while, which would round depth away.

    Args:
        image: On the device in question.
    """
    kind = image.device.type
    # Where there is nothing to leave, exported graphs must not have a region of their own for it.
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def depth_statistics(depth: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the valid depth of every sample.

    Args:
        depth: (N, 1, h, w), any unit; values outside ``valid`` are ignored, NaN included.
        valid: (N, 1, h, w) bool.

    Returns:
        Mean and deviation, (N, 1, 1, 1) float64; the deviation of a constant map is exactly 0.
    """
    # Float64: the mean of millimetres over megapixels, and equivariance under a large offset, need more than
    # 24 bits.
    count = valid.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    wide = torch.where(valid, depth, 0).double()
    mean = wide.sum(dim=(1, 2, 3), keepdim=True) / count
    std = (torch.where(valid, wide - mean, 0).square().sum(dim=(1, 2, 3), keepdim=True) / count).sqrt()
    # Rounding of a constant map must not be blown up into a pattern.
    return mean, torch.where(std > 1e-6 * mean.abs(), std, 0)


def normalize_depth(depth: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring the valid depth of every sample to zero mean and unit deviation.

    Args:
        depth: (N, 1, h, w), any unit; values outside ``valid`` are ignored, NaN included.
        valid: (N, 1, h, w) bool.

    Returns:
        The normalised depth, 0 where invalid; mean and deviation, (N, 1, 1, 1). A constant map has deviation
        0 and is all 0.
    """
    mean, std = depth_statistics(depth, valid)
    centred = torch.where(valid, depth, 0).double() - mean
    normalized = torch.where(valid & (std > 0), centred / torch.where(std > 0, std, 1), 0)
    return normalized.to(depth.dtype), mean.to(depth.dtype), std.to(depth.dtype)


def image_statistics(image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation over the pixels and colours of every sample of (N, C, H, W), each (N, 1, 1, 1)."""
    # Much faster than torch.std_mean, and as exact for values of about one.
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    return mean, (image - mean).square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


def normalize_locally(depth: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the mean of a window around every pixel and divide by its deviation.

    Args:
        depth: (N, 1, h, w) of about unit deviation.

    Returns:
        The result and the deviation, (N, 1, h, w) each.
    """

    def blur(image: Tensor) -> Tensor:
        return F.avg_pool2d(image, _WINDOW, stride=1, padding=_WINDOW // 2, count_include_pad=False)

    mean = blur(depth)
    deviation = (blur((depth - mean).square()) + _FLOOR**2).sqrt()
    return (depth - mean) / deviation, deviation


def fill_holes(depth: Tensor, valid: Tensor) -> Tensor:
    """Give invalid pixels the weighted mean of valid ones near them (pull-push over an image pyramid).

    Args:
        depth: (N, 1, h, w), finite.
        valid: (N, 1, h, w) bool; at least one valid pixel per sample, else the sample becomes 0.

    Returns:
        (N, 1, h, w): ``depth`` where valid, smooth values elsewhere.
    """
    # Only a shortcut, which on a GPU would make the CPU wait for all that was asked of it.
    if valid.device.type == "cpu" and bool(valid.all()):
        return depth
    weight = valid.to(depth.dtype)
    levels = [(depth * weight, weight)]
    while max(levels[-1][0].shape[-2:]) > 1:
        total, mass = levels[-1]
        levels.append(
            (
                F.avg_pool2d(total, 2, ceil_mode=True, count_include_pad=False),
                F.avg_pool2d(mass, 2, ceil_mode=True, count_include_pad=False),
            )
        )
    total, mass = levels.pop()
    filled = torch.where(mass > 0, total / mass.clamp(min=1e-12), 0)
    while levels:
        total, mass = levels.pop()
        coarse = F.interpolate(filled, scale_factor=2, mode="bilinear", align_corners=False)
        coarse = coarse[..., : total.shape[-2], : total.shape[-1]]
        # A cell partly covered takes its own mean; only an empty one needs the coarser level.
        filled = torch.where(mass > 0, total / mass.clamp(min=1e-12), coarse)
    return torch.where(valid, depth, filled)


def cubic_kernel(distance: Tensor) -> Tensor:
    """Weights of Keys' cubic convolution at distances of at least 0, in samples."""
    a = _KEYS_A
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, 0))


def bands(columns: Tensor, weights: Tensor, length: int) -> Bands:
    """Make a matrix near whose diagonal the weights lie, in blocks of rows where it is large.

    The cost of a product with it then grows with the number of pixels, not with that times the side of the image.

    Args:
        columns: (rows, taps) int64, where the weights of a row lie; what lies on the same place is added.
        weights: (rows, taps).
        length: Number of columns.
    """
    rows = weights.shape[0]

    def block(first: int, last: int, begin: int, end: int) -> Tensor:
        table = torch.zeros(last - first, end - begin, dtype=weights.dtype, device=weights.device)
        return table.scatter_add(1, columns[first:last] - begin, weights[first:last])

    # A GPU would wait for the answer which columns are used, and does the whole product in no time.
    if torch.compiler.is_compiling() or max(rows, length) <= _DENSE or weights.device.type != "cpu":
        return [(slice(None), block(0, rows, 0, length))]
    step = max(16, _BAND * rows // max(rows, length))
    blocks = []
    for first in range(0, rows, step):
        last = min(rows, first + step)
        begin, end = (int(edge) for edge in columns[first:last].aminmax())
        blocks.append((slice(begin, end + 1), block(first, last, begin, end + 1)))
    return blocks


def interpolation(length: int, positions: Tensor, mode: str, dtype: torch.dtype) -> Bands:
    """Weights that interpolate along one axis; edge pixels repeat outside.

    Args:
        length: Number of pixels there are.
        positions: (n,) float64 pixel indices, rising: 0 is the centre of the first.
        mode: "cubic" or "linear".
        dtype: Of the result.

    Returns:
        (n, length).
    """
    base = positions.floor()[:, None]
    first, end = (-1, 3) if mode == "cubic" else (0, 2)
    offsets = torch.arange(first, end, device=positions.device)
    distance = (positions[:, None] - base - offsets).abs()
    weights = cubic_kernel(distance) if mode == "cubic" else 1 - distance
    return bands((base.long() + offsets).clamp(0, length - 1), weights.to(dtype), length)


def resample(image: Tensor, across: Bands, along: Bands) -> Tensor:
    """Resample an image by a matrix of weights per axis.

    As products of matrices: nearly all of their weights are zero, yet they take a fraction of the time that gathering
    the pixels does.

    Args:
        image: (N, C, h, w).
        across: (H', h) weights with which rows make rows.
        along: (W', w) likewise for columns.

    Returns:
        (N, C, H', W').
    """
    with full_precision(image):
        tall = torch.cat([weights @ image[..., used, :] for used, weights in across], dim=-2)
        return torch.cat([tall[..., used] @ weights.T for used, weights in along], dim=-1)


def sample_rows_columns(image: Tensor, rows: Tensor, columns: Tensor, *, mode: str = "cubic") -> Tensor:
    """Interpolate an image at the crossings of ``rows`` and ``columns``.

    Args:
        image: (N, C, h, w).
        rows: (H',) float64 positions, rising, in pixel indices of the image: 0 is the centre of the first row.
        columns: (W',) likewise.
        mode: "cubic" or "linear".

    Returns:
        (N, C, H', W').
    """
    across = interpolation(image.shape[-2], rows, mode, image.dtype)
    return resample(image, across, interpolation(image.shape[-1], columns, mode, image.dtype))


def positions(start: int, count: int, step: float, ratio: float, device: torch.device) -> Tensor:
    """Low-resolution positions of a grid laid over the high-resolution image.

    Both images share their outer edges (``align_corners=False``).

    Args:
        start: First high-resolution pixel of the grid.
        count: Number of grid cells.
        step: Size of a cell in high-resolution pixels.
        ratio: High-resolution over low-resolution length.
        device: Where the result lies.

    Returns:
        (count,) float64 pixel indices in the low-resolution image.
    """
    centres = start + (torch.arange(count, dtype=torch.float64, device=device) + 0.5) * step
    return centres / ratio - 0.5


def covered(start: int, length: int, ratio: float, count: int) -> slice:
    """Low-resolution pixels that an interpolation over a part of the high resolution may touch, with a margin.

    Args:
        start: First high-resolution pixel of the part.
        length: Number of its pixels; it may reach beyond the image.
        ratio: High-resolution over low-resolution length.
        count: Number of low-resolution pixels.
    """
    if start == 0 and length >= ratio * count:
        return slice(0, count)
    first = min(max(0, math.floor(start / ratio) - 3), count - 1)
    return slice(first, max(first + 1, min(count, math.ceil((start + length) / ratio) + 3)))


def sample_window(
    image: Tensor,
    origin: tuple[int, int],
    size: tuple[int, int],
    ratio: tuple[float, float],
    *,
    step: float = 1,
    mode: str = "cubic",
) -> Tensor:
    """Interpolate a low-resolution image over a part of the high resolution.

    Args:
        image: (N, C, h, w), the whole low resolution.
        origin: First pixel of the part, vertical and horizontal.
        size: (H', W') of the part in pixels, whole multiples of ``step``.
        ratio: High-resolution over low-resolution length.
        step: Side of the cells in whose middles to interpolate, in pixels.
        mode: "cubic" or "linear".

    Returns:
        (N, C, H' / step, W' / step).
    """
    rows = covered(origin[0], size[0], ratio[0], image.shape[-2])
    columns = covered(origin[1], size[1], ratio[1], image.shape[-1])
    y = positions(origin[0], round(size[0] / step), step, ratio[0], image.device) - rows.start
    x = positions(origin[1], round(size[1] / step), step, ratio[1], image.device) - columns.start
    return sample_rows_columns(image[..., rows, columns], y, x, mode=mode)
