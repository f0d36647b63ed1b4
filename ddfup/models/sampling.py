"""How low-resolution depth comes onto a network's grids: normalisation, hole filling, cubic resampling.

Every function here is linear in depth with weights that sum to one, or returns the numbers to undo it, so
that a network built on it is exactly equivariant: ``f(a * depth + b) = a * f(depth) + b`` for a > 0.
"""

from __future__ import annotations

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
    if bool(valid.all()):
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


def _cubic_taps(length: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (4, n) and weights (4, n) of the cubic taps at ``positions``; edge pixels repeat outside."""
    base = positions.floor()
    t = positions - base
    a = _KEYS_A
    offsets = torch.arange(-1, 3, device=positions.device)
    distance = (t[None, :] - offsets[:, None]).abs()
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    weights = torch.where(distance <= 1, near, far)
    indices = (base.long()[None, :] + offsets[:, None]).clamp(0, length - 1)
    return indices, weights


def _linear_taps(length: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (2, n) and weights (2, n) of the linear taps at ``positions``; edge pixels repeat outside."""
    base = positions.floor()
    t = positions - base
    indices = torch.stack((base.long(), base.long() + 1)).clamp(0, length - 1)
    return indices, torch.stack((1 - t, t))


def sample_rows_columns(image: Tensor, rows: Tensor, columns: Tensor, *, mode: str = "cubic") -> Tensor:
    """Interpolate an image at the crossings of ``rows`` and ``columns``.

    Args:
        image: (N, C, h, w).
        rows: (H',) float64 positions in pixel indices of the image: 0 is the centre of the first row.
        columns: (W',) likewise.
        mode: "cubic" or "linear".

    Returns:
        (N, C, H', W').
    """
    taps = _cubic_taps if mode == "cubic" else _linear_taps
    indices, weights = taps(image.shape[-2], rows)
    weights = weights.to(image.dtype)
    tall = sum(image[..., indices[k], :] * weights[k, :, None] for k in range(len(indices)))
    assert isinstance(tall, Tensor)
    indices, weights = taps(image.shape[-1], columns)
    weights = weights.to(image.dtype)
    wide = sum(tall[..., indices[k]] * weights[k] for k in range(len(indices)))
    assert isinstance(wide, Tensor)
    return wide


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
