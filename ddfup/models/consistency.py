"""What was measured must come out again: a result made low once more is compared with the low resolution it is from.

The difference is given back where the network is least sure. This is the update of a linear measurement with a prior of
independent pixels (the Kalman gain), with a learned variance, for measurements that overlap little. How depth was made
low shows in the differences themselves: over a whole image the right filter leaves the smallest.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ddfup.models.parts import Prepared
from ddfup.models.sampling import (
    Bands,
    bands,
    covered,
    cubic_kernel,
    full_precision,
    interpolation,
    positions,
    resample,
)

# How depth may have been made low.
_KINDS = ("nearest", "area", "bilinear", "bicubic")
# What is given back is not yet all: corrections of neighbours overlap. Each pass takes steps of its own.
_PASSES = 4
# The context says how far to trust the measurement in the first pass, and in all others.
_TRUSTS = 2
# How far a pass sees, in low-resolution pixels: the widest filter, and the cubic interpolation of what it finds.
_REACH = 4
# Tolerance, in pixels, of the comparisons that say which pixel is the middle of a cell and which lie in it: runtimes of
# exported networks may have ratios in float32.
_TIE = 1e-3
# Rows of a strip in which large images are compared, so that what is computed on the way stays small.
_STRIP = 1024
# Evidence for a filter: the logarithm of its differences' mean amount (squares would let a few thin things decide). One
# filter's is a tenth smaller than another's, of which this makes a number that weights of a tenth suffice for. It does
# not grow with the number of pixels: what the network itself gets wrong, it gets wrong in all of them.
_EVIDENCE_SCALE = 130.0
_EVIDENCE_WEIGHT = 0.12
# Added to a difference before its logarithm is taken, in deviations of the depth: flat images have none.
_EVIDENCE_FLOOR = 1e-4
# Logarithm of the variance that the network may claim; beyond, its gradient would fade or explode.
_LOG_VARIANCE = 4.0


def reach(ratio: float) -> int:
    """Return how far, in pixels, a result depends on others through the comparison."""
    return _PASSES * (int(_REACH * ratio) + 2)


def shrinking(kind: str, pixels: slice, start: int, length: int, ratio: float, like: Tensor) -> Bands:
    """Weights with which high-resolution pixels make low-resolution ones, along one axis.

    Args:
        kind: "nearest" (the pixel at the centre, of two the upper), or an antialiased "area", "bilinear" or "bicubic".
        pixels: Low-resolution pixels.
        start: High-resolution pixel to begin with.
        length: Number of high-resolution pixels; weights on others are left out, and the rest scaled to sum to one.
        ratio: High-resolution over low-resolution length.
        like: Gives type and device.

    Returns:
        A row per low-resolution pixel.
    """
    low = ((torch.arange(pixels.start, pixels.stop, dtype=torch.float64, device=like.device) + 0.5) * ratio)[:, None]
    # At ratios below one pixel per cell a filter is not narrowed further. The widest reaches two cells to either side.
    cell = max(ratio, 1.0)
    # Rounded, and one more than the most, since exported files know no other way from a length to a whole number.
    reached = torch.arange(round(4 * cell) + 3, dtype=torch.float64, device=like.device)
    high = (low - 2 * cell - 0.5).floor() + reached
    distance = high + 0.5 - low
    if kind == "nearest":
        # Halves fall to the upper left.
        weights = (high == (low - 1 - _TIE).ceil()).double()
    elif kind == "area":
        # The half-open cell: a pixel on the border belongs to one side.
        weights = ((distance - _TIE > -cell / 2) & (distance - _TIE <= cell / 2)).double()
    elif kind == "bilinear":
        weights = (1 - distance.abs() / cell).clamp(min=0)
    else:
        weights = cubic_kernel(distance.abs() / cell)
    columns = high.long() - start
    weights = weights * ((columns >= 0) & (columns < length))
    total = weights.sum(dim=1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1)
    return bands(columns.clamp(0, length - 1), weights.to(like.dtype), length)


def footprint(pixels: slice, ratio: float) -> slice:
    """High-resolution pixels, also outside the image, that low-resolution ones are made of, along one axis."""
    reach = 2 * max(ratio, 1.0) + 1
    return slice(math.floor((pixels.start + 0.5) * ratio - reach), math.ceil((pixels.stop - 0.5) * ratio + reach))


class Alignment:
    """How a part of the high resolution lies on the low resolution, with the filters from one to the other.

    Args:
        part: (N, C, H', W') of the high resolution: gives size, type and device.
        origin: Offset of the part in pixels, top and left.
        ratio: High-resolution over low-resolution length, vertical and horizontal.
        size: (h, w) of the whole low resolution.
        pixels: Rows and columns of the low resolution; None: those that the part touches.
    """

    def __init__(
        self,
        part: Tensor,
        origin: tuple[int, int],
        ratio: tuple[float, float],
        size: tuple[int, int],
        pixels: tuple[slice, slice] | None = None,
    ) -> None:
        lengths = part.shape[-2], part.shape[-1]
        if pixels is None:
            pixels = (
                covered(origin[0], lengths[0], ratio[0], size[0]),
                covered(origin[1], lengths[1], ratio[1], size[1]),
            )
        self._pixels = pixels
        # Of rows and of columns, for every way that depth may have been made low.
        self._shrinking = [
            [shrinking(kind, pixels[axis], origin[axis], lengths[axis], ratio[axis], part) for axis in (0, 1)]
            for kind in _KINDS
        ]
        self._spreading = []
        for axis in (0, 1):
            places = positions(origin[axis], lengths[axis], 1, ratio[axis], part.device) - pixels[axis].start
            count = pixels[axis].stop - pixels[axis].start
            self._spreading.append(interpolation(count, places, "cubic", part.dtype))

    def crop(self, low: Tensor) -> Tensor:
        """Cut what belongs to the part from what is known of the whole low resolution, (N, C, h, w)."""
        return low[..., self._pixels[0], self._pixels[1]]

    def degrade(self, image: Tensor) -> Tensor:
        """Make the part, (N, 1, H', W'), low in every way.

        Returns:
            (N, 4, h', w'), a channel for nearest, area, bilinear and bicubic.
        """
        return torch.cat([resample(image, *axes) for axes in self._shrinking], dim=1)

    def average(self, image: Tensor) -> Tensor:
        """Make the part low by the filter that has no negative weights and no gaps."""
        return resample(image, *self._shrinking[_KINDS.index("bilinear")])

    def spread(self, low: Tensor) -> Tensor:
        """Interpolate (N, 1, h', w') over the part."""
        return resample(low, *self._spreading)


def _degrade_by_strips(prepared: Prepared, depth: Tensor) -> Tensor:
    """Make the whole high resolution, (N, 1, H, W), low in every way, (N, 4, h, w), some rows at a time."""
    height, (count, width) = depth.shape[-2], prepared.size
    step = max(1, int(_STRIP / prepared.ratio[0]))
    parts = []
    for first in range(0, count, step):
        rows = slice(first, min(count, first + step))
        used = footprint(rows, prepared.ratio[0])
        top, bottom = max(0, used.start), min(height, used.stop)
        strip = depth[..., top:bottom, :]
        alignment = Alignment(strip, (top, 0), prepared.ratio, (count, width), (rows, slice(0, width)))
        parts.append(alignment.degrade(strip))
    return torch.cat(parts, dim=-2)


class Consistency(nn.Module):
    """Correct a result by what its own low resolution lacks.

    How depth was made low is estimated from the context and from the whole image's differences, how far it can be
    trusted from the context.

    Args:
        context_channels: Width of the vector that describes the depth map.
    """

    def __init__(self, context_channels: int) -> None:
        super().__init__()
        # One logit per filter, and those of the trust in the measurement.
        self.estimate = nn.Linear(context_channels, len(_KINDS) + _TRUSTS)
        nn.init.zeros_(self.estimate.weight)
        nn.init.zeros_(self.estimate.bias)
        # The smaller the differences, the likelier the filter.
        self.evidence = nn.Linear(len(_KINDS), len(_KINDS), bias=False)
        with torch.no_grad():
            self.evidence.weight.copy_(-_EVIDENCE_WEIGHT * torch.eye(len(_KINDS)))
        # How much of a correction a pass makes: of a wide filter's more than all of it can be best, while samples
        # of single pixels have nothing left after the first.
        self.steps = nn.Parameter(torch.ones(len(_KINDS), _PASSES))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Read weights, also those of before the evidence was weighed, when there were two passes of whole steps."""
        state_dict.setdefault(f"{prefix}evidence.weight", torch.zeros_like(self.evidence.weight))
        steps = torch.zeros_like(self.steps)
        steps[:, :2] = 1
        state_dict.setdefault(f"{prefix}steps", steps)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def weigh(self, degraded: Tensor, measured: Tensor, valid: Tensor, context: Tensor) -> Tensor:
        """Estimate how depth was made low.

        Args:
            degraded: (N, 4, h, w) the whole result made low in every way, see :meth:`Alignment.degrade`.
            measured: (N, 1, h, w), the whole low resolution, holes filled.
            valid: (N, 1, h, w) bool: where it was measured.
            context: (N, channels).

        Returns:
            (N, 4) shares of the filters, which sum to one.
        """
        # What is estimated here is no reason to change the result.
        difference = (measured - degraded.detach()) * valid
        # An image that is all holes must not become NaN.
        pixels = valid.sum(dim=(2, 3)).clamp(min=1).to(difference.dtype)
        logarithms = (difference.abs().sum(dim=(2, 3)) / pixels).add(_EVIDENCE_FLOOR).log()
        # Only how the filters compare tells them apart, not how large the differences are.
        evidence = _EVIDENCE_SCALE * (logarithms - logarithms.mean(dim=1, keepdim=True))
        logits = self.estimate(context.to(measured.dtype))[:, : len(_KINDS)] + self.evidence(evidence)
        shares: Tensor = logits.softmax(dim=1)
        return shares

    def forward(self, prepared: Prepared, estimate: Tensor) -> Tensor:
        """Make the result of the estimate of a whole image, by strips where it is large.

        Args:
            prepared: Of the image.
            estimate: (N, 2, H, W) normalised depth, and the logarithm of its variance on any scale.

        Returns:
            (N, 1, H, W) in the unit of the depth.
        """
        with full_precision(estimate):
            height, margin = estimate.shape[-2], reach(prepared.ratio[0])
            if torch.compiler.is_compiling() or torch.is_grad_enabled() or height <= _STRIP:
                alignment = Alignment(estimate, (0, 0), prepared.ratio, prepared.size)
                degraded = alignment.degrade(estimate[:, :1])
                return self._correct(prepared, estimate, degraded, self._shares(prepared, degraded), alignment)
            degraded = _degrade_by_strips(prepared, estimate[:, :1])
            shares = self._shares(prepared, degraded)
            result = torch.empty_like(estimate[:, :1])
            rows = max(_STRIP, 4 * margin)
            for top in range(0, height, rows):
                bottom = min(height, top + rows)
                first, last = max(0, top - margin), min(height, bottom + margin)
                strip = estimate[..., first:last, :]
                alignment = Alignment(strip, (first, 0), prepared.ratio, prepared.size)
                part = self._correct(prepared, strip, degraded, shares, alignment)
                result[..., top:bottom, :] = part[..., top - first : bottom - first, :]
            return result

    def _shares(self, prepared: Prepared, degraded: Tensor) -> Tensor:
        return self.weigh(degraded, prepared.depth, prepared.valid, prepared.context)

    def _correct(
        self, prepared: Prepared, estimate: Tensor, degraded: Tensor, shares: Tensor, alignment: Alignment
    ) -> Tensor:
        """From the estimate of a part, (N, 2, H', W'), to its result, (N, 1, H', W'), in the unit of the depth."""
        images = estimate[:, :1], estimate[:, 1:], prepared.depth, prepared.valid
        result = self.correct(*images, prepared.context, degraded, shares, alignment)
        return result * prepared.std + prepared.mean

    def correct(
        self,
        result: Tensor,
        log_variance: Tensor,
        measured: Tensor,
        valid: Tensor,
        context: Tensor,
        degraded: Tensor,
        shares: Tensor,
        alignment: Alignment,
    ) -> Tensor:
        """Correct a part of the image, or all of it.

        Args:
            result: (N, 1, H', W') in the unit of ``measured``, a part of the image.
            log_variance: (N, 1, H', W') how unsure the network is, on any scale.
            measured: (N, 1, h, w), the whole low resolution, holes filled.
            valid: (N, 1, h, w) bool: where it was measured.
            context: (N, channels).
            degraded: (N, 4, h, w) the whole result made low in every way.
            shares: (N, 4) from :meth:`weigh`.
            alignment: Of the part.

        Returns:
            (N, 1, H', W').
        """
        trust = self.estimate(context.to(result.dtype))[:, len(_KINDS) :].sigmoid()
        trust = torch.cat((trust, trust[:, -1:].expand(-1, _PASSES - _TRUSTS)), dim=1)
        steps = (trust * (shares @ self.steps.to(shares.dtype)))[:, :, None, None]
        variance = log_variance.to(result.dtype).clamp(-_LOG_VARIANCE, _LOG_VARIANCE).exp()
        measured, valid, degraded = (alignment.crop(image) for image in (measured, valid, degraded))
        # A filter with negative weights could make the quotient anything.
        gain = valid / alignment.average(variance).clamp(min=1e-6)
        for i in range(_PASSES):
            if i > 0:
                degraded = alignment.degrade(result)
            low = (degraded * shares[:, :, None, None]).sum(dim=1, keepdim=True)
            missing = steps[:, i : i + 1] * gain * (measured - low)
            result = result + variance * alignment.spread(missing)
        return result
