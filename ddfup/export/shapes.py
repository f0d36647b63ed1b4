"""What in the networks loops over sizes, written anew so that one graph serves every size.

Each function here computes what the one of its name in :mod:`ddfup.models` does, up to the order of sums; where loops
there end with the size, here they have a fixed length, or became one batch. A tensor axis here is never shorter than
two: tracing would take a length of one for a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ddfup.models import context
from ddfup.models.blocks import activation

# Of the pyramid that fills holes: serves depth up to 2 ** _LEVELS pixels a side.
_LEVELS = 12
MOST_DEPTH = 2**_LEVELS
# No window of the context encoder is longer: its sides are rounded to whole numbers of them.
_LONGEST = context._WINDOW * 3 // 2


def fill_holes(depth: Tensor, valid: Tensor) -> Tensor:
    """Give invalid pixels the weighted mean of valid ones near them; see :func:`ddfup.models.sampling.fill_holes`.

    Args:
        depth: (N, 1, h, w), finite, sides of 2 to `MOST_DEPTH` pixels.
        valid: (N, 1, h, w) bool.
    """
    weight = valid.to(depth.dtype)
    sides = (depth.shape[-2], depth.shape[-1])
    level = torch.cat((depth * weight, weight), dim=1)
    levels = []
    for i in range(_LEVELS):
        levels.append(level)
        # Every level has rows and columns beyond those that count, which nobody reads.
        for axis in (-2, -1):
            pairs = torch.arange(2 * (sides[axis] // 2 ** (i + 1) + 2), device=depth.device)
            level = level.index_select(axis, pairs.clamp(max=_halved(sides[axis], i) - 1))
        level = F.avg_pool2d(level, 2)
    filled = _mean(level, 0)
    for i in range(_LEVELS - 1, -1, -1):
        for axis in (-2, -1):
            edge = torch.arange(sides[axis] // 2 ** (i + 1) + 4, device=depth.device)
            filled = filled.index_select(axis, edge.clamp(max=_halved(sides[axis], i + 1) - 1))
        coarse = F.interpolate(filled, scale_factor=2, mode="bilinear", align_corners=False)
        height, width = (side // 2**i + (2 if i else 0) for side in sides)
        filled = _mean(levels[i], coarse[..., :height, :width])
    return torch.where(valid, depth, filled)


def _halved(side: Any, times: int) -> Any:
    """A side halved so many times, rounded up."""
    return (side + 2**times - 1) // 2**times


def _mean(level: Tensor, empty: Tensor | int) -> Tensor:
    total, mass = level[:, :1], level[:, 1:]
    return torch.where(mass > 0, total / mass.clamp(min=1e-12), empty)


def describe(encoder: context.ContextEncoder, depth: Tensor, valid: Tensor, ratio: Any) -> Tensor:
    """Describe a depth map by one vector; see :class:`ddfup.models.context.ContextEncoder`.

    Args:
        encoder: Whose weights serve.
        depth: (1, 1, h, w).
        valid: (1, 1, h, w) bool.
        ratio: High-resolution over low-resolution size, a number or symbol.

    Returns:
        (1, channels).
    """
    both = torch.cat((depth, 1 - valid.to(depth.dtype)), dim=1)
    height, width = both.shape[-2:]
    rows, columns = _count(height), _count(width)
    # As many windows as there may be at most are one batch, each in a frame of the longest; those that are not there
    # are empty.
    most = context._WINDOWS
    row, column = (axis.flatten() for axis in torch.meshgrid(*(torch.arange(most),) * 2, indexing="ij"))
    places = torch.arange(_LONGEST)
    top, bottom = _span(height, rows, row)
    left, right = _span(width, columns, column)
    y, x = top[:, None] + places, left[:, None] + places
    exists = ((row < rows) & (column < columns))[:, None]
    inside = ((y < bottom[:, None]) & exists)[:, :, None] & (x < right[:, None])[:, None, :]
    mask = inside[:, None].to(both.dtype)
    pixels = y.clamp(max=height - 1)[:, :, None] * width + x.clamp(max=width - 1)[:, None, :]
    windows = both.reshape(2, -1).index_select(1, pixels.flatten()).reshape(2, most**2, _LONGEST, _LONGEST)
    windows = windows.transpose(0, 1) * mask

    area = mask.sum(dim=(2, 3))
    divisor = area.clamp(min=1)
    features = activation(encoder.first(windows)) * mask
    features = activation(encoder.second(features)) * mask
    mean = features.sum(dim=(2, 3)) / divisor
    variance = features.square().sum(dim=(2, 3)) / divisor - mean.square()
    deviation = variance.clamp(min=0).add(1e-2).sqrt()
    share = windows[:, 1:].sum(dim=(2, 3)) / divisor
    scalars = torch.cat((share, torch.full_like(share, ratio).log2() / 3), dim=1)
    each = activation(encoder.mix(torch.cat((mean, deviation, scalars), dim=1)))
    mean_of_all: Tensor = (each * area).sum(dim=0, keepdim=True) / area.sum()
    return mean_of_all


def _count(length: Any) -> Any:
    """How many windows a side is cut into."""
    side = context._WINDOW
    # length / side rounded, halves to the even number as Python does, in whole numbers.
    pairs, rest = length // (2 * side), length % (2 * side)
    more = (rest + side + side // 2 - 1) // (2 * side) + (rest + side // 2) // (2 * side)
    largest: Any = torch.sym_max
    return largest(1, 2 * pairs + more)


def _span(length: Any, count: Any, index: Tensor) -> tuple[Tensor, Tensor]:
    """Begin and end of the windows taken from a side."""
    # Where not all of them are taken, so many as there may be lie evenly spread; else the spread is the smaller.
    # Windows that do not exist lie beyond the side, and what is read for them is not used.
    spread = torch.div(index * (count - 1), context._WINDOWS - 1, rounding_mode="floor")
    taken = torch.maximum(index, spread)
    return (
        torch.div(length * taken, count, rounding_mode="floor"),
        torch.div(length * (taken + 1), count, rounding_mode="floor"),
    )
