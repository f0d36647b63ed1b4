"""What was measured must come out again: a result made low once more is compared with the low resolution it is from.

The difference is given back where the network is least sure. This is the update of a linear measurement with a prior of
independent pixels (the Kalman gain), with a learned variance, for measurements that overlap little.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ddfup.models.sampling import Bands, bands, covered, cubic_kernel, interpolation, positions, resample

# How depth may have been made low.
_KINDS = ("nearest", "area", "bilinear", "bicubic")
# What is given back is not yet all: corrections of neighbours overlap. A third pass gains little.
_PASSES = 2
# How far a pass sees, in low-resolution pixels: the widest filter, and the cubic interpolation of what it finds.
_REACH = 4
# Tolerance, in pixels, of the comparisons that say which pixel is the middle of a cell and which lie in it: runtimes of
# exported networks may have ratios in float32.
_TIE = 1e-3
# Logarithm of the variance that the network may claim; beyond, its gradient would fade or explode.
_LOG_VARIANCE = 4.0


def reach(ratio: float) -> int:
    """Return how far, in pixels, a result depends on others through the comparison."""
    return _PASSES * (int(_REACH * ratio) + 2)


def shrinking(kind: str, first: int, count: int, start: int, length: int, ratio: float, like: Tensor) -> Tensor:
    """Weights with which high-resolution pixels make low-resolution ones, along one axis.

    Args:
        kind: "nearest" (the pixel at the centre, of two the upper), or an antialiased "area", "bilinear" or "bicubic".
        first: Low-resolution pixel to begin with.
        count: Number of low-resolution pixels.
        start: High-resolution pixel to begin with.
        length: Number of high-resolution pixels; weights on others are left out, and the rest scaled to sum to one.
        ratio: High-resolution over low-resolution length.
        like: Gives type and device.

    Returns:
        (count, length).
    """
    low = (torch.arange(first, first + count, dtype=torch.float64, device=like.device) + 0.5) * ratio
    high = torch.arange(start, start + length, dtype=torch.float64, device=like.device) + 0.5
    if kind == "nearest":
        # Halves fall to the upper left.
        nearest = (low - 0.5 - 0.5 - _TIE).ceil()
        weights = (high[None, :] - 0.5 == nearest[:, None]).double()
    else:
        # At ratios below one pixel per cell a filter is not narrowed further.
        distance = (high[None, :] - low[:, None]).abs() / max(ratio, 1.0)
        if kind == "area":
            # The half-open cell: a pixel on the border belongs to one side.
            signed = high[None, :] - low[:, None] - _TIE
            half = max(ratio, 1.0) / 2
            weights = ((signed > -half) & (signed <= half)).double()
        elif kind == "bilinear":
            weights = (1 - distance).clamp(min=0)
        else:
            weights = cubic_kernel(distance)
    total = weights.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1), 0).to(like.dtype)


def shrinking_bands(kind: str, pixels: slice, start: int, length: int, ratio: float, like: Tensor) -> Bands:
    """`shrinking` for some low-resolution pixels, in blocks where it is large.

    Args:
        kind: As of `shrinking`, like all but the next argument.
        pixels: Low-resolution pixels.
        start: See `shrinking`.
        length: See `shrinking`.
        ratio: See `shrinking`.
        like: See `shrinking`.
    """
    # The widest filter reaches two cells to either side.
    reach = 2 * max(ratio, 1.0) + 1

    def used(first: int, last: int) -> tuple[int, int]:
        low, high = (pixels.start + first + 0.5) * ratio - reach, (pixels.start + last - 0.5) * ratio + reach
        return math.floor(low) - start, math.ceil(high) - start

    def make(first: int, count: int, begin: int, width: int) -> Tensor:
        return shrinking(kind, pixels.start + first, count, start + begin, width, ratio, like)

    return bands(pixels.stop - pixels.start, length, like.device, used, make)


class Consistency(nn.Module):
    """Correct a result by what its own low resolution lacks.

    How depth was made low, and how far it can be trusted, is estimated from the context.

    Args:
        context_channels: Width of the vector that describes the depth map.
    """

    def __init__(self, context_channels: int) -> None:
        super().__init__()
        # One logit per filter, and one per pass for the trust in the measurement.
        self.estimate = nn.Linear(context_channels, len(_KINDS) + _PASSES)
        nn.init.zeros_(self.estimate.weight)
        nn.init.zeros_(self.estimate.bias)

    def forward(
        self,
        result: Tensor,
        log_variance: Tensor,
        measured: Tensor,
        valid: Tensor,
        context: Tensor,
        *,
        origin: tuple[int, int],
        ratio: tuple[float, float],
    ) -> Tensor:
        """Correct.

        Args:
            result: (N, 1, H', W') in the unit of ``measured``: the part of the image that begins at ``origin``.
            log_variance: (N, 1, H', W') how unsure the network is, on any scale.
            measured: (N, 1, h, w), the whole low resolution, holes filled.
            valid: (N, 1, h, w) bool: where it was measured.
            context: (N, channels).
            origin: Offset of the part in pixels, top and left.
            ratio: High-resolution over low-resolution length, vertical and horizontal.

        Returns:
            (N, 1, H', W').
        """
        estimate = self.estimate(context.to(result.dtype))
        shares = estimate[:, : len(_KINDS)].softmax(dim=1)[:, :, None, None]
        trust = estimate[:, len(_KINDS) :].sigmoid()[:, :, None, None]
        variance = log_variance.to(result.dtype).clamp(-_LOG_VARIANCE, _LOG_VARIANCE).exp()
        height, width = result.shape[-2:]
        rows = covered(origin[0], height, ratio[0], measured.shape[-2])
        columns = covered(origin[1], width, ratio[1], measured.shape[-1])
        measured, valid = measured[..., rows, columns], valid[..., rows, columns]
        filters = {
            kind: (
                shrinking_bands(kind, rows, origin[0], height, ratio[0], result),
                shrinking_bands(kind, columns, origin[1], width, ratio[1], result),
            )
            for kind in _KINDS
        }

        def shrink(image: Tensor, kind: str) -> Tensor:
            return resample(image, *filters[kind])

        # A filter without negative weights, or the quotient could be anything.
        gain = valid / shrink(variance, "bilinear").clamp(min=1e-6)
        y = positions(origin[0], height, 1, ratio[0], result.device) - rows.start
        x = positions(origin[1], width, 1, ratio[1], result.device) - columns.start
        spread = (
            interpolation(measured.shape[-2], y, "cubic", result.dtype),
            interpolation(measured.shape[-1], x, "cubic", result.dtype),
        )
        for i in range(_PASSES):
            low = sum(shares[:, k : k + 1] * shrink(result, kind) for k, kind in enumerate(_KINDS))
            missing = trust[:, i : i + 1] * gain * (measured - low)
            result = result + variance * resample(missing, *spread)
        return result
