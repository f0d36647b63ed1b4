"""Classical methods to compare with: interpolations at the right phase, and filters that look at the guide.

All work in float64 with the same operations whatever the number of threads. The filters smooth the bicubic
interpolation; their settings were chosen from a coarse grid on two (joint bilateral) or four of the
NYU frames that the networks are tuned on, bicubic low resolution.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ddfup.benchmark.low_resolution import LowResolution, Positions, filled

Image = NDArray[np.float64]
Baseline = Callable[[LowResolution, NDArray[Any]], Image]


# --- interpolation ---


def _coordinates(positions: Positions, length: int) -> Positions:
    """Say for each pixel how far along the samples it lies: 0 at the first, 1 at the second ..."""
    count = len(positions)
    if count == 1:
        return np.zeros(length)
    x = np.arange(length, dtype=np.float64)
    inside = np.interp(x, positions, np.arange(count))
    before = (x - positions[0]) / (positions[1] - positions[0])
    after = count - 1 + (x - positions[-1]) / (positions[-1] - positions[-2])
    along = np.where(x < positions[0], before, np.where(x > positions[-1], after, inside))
    # Just inside of half a step beyond the ends, so that every kernel has weight on the outermost sample.
    return np.clip(along, -0.5 + 1e-6, count - 0.5 - 1e-6)


def _box(distance: Positions) -> Positions:
    # A pixel half-way between two samples takes the first; rounding must not decide.
    return ((distance >= -0.5 - 1e-9) & (distance < 0.5 - 1e-9)).astype(np.float64)


def _triangle(distance: Positions) -> Positions:
    return np.asarray(np.maximum(1 - np.abs(distance), 0), np.float64)


def _cubic(distance: Positions) -> Positions:
    """Keys 1981 with a = -1/2, the kernel of Pillow and of MATLAB's imresize."""
    d = np.abs(distance)
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return np.asarray(np.where(d < 1, near, np.where(d < 2, far, 0)), np.float64)


def _along_rows(image: Image, positions: Positions, length: int, kernel: Callable[[Positions], Positions]) -> Image:
    """Interpolate axis 0; taps beyond the ends are left out and the others share their weight."""
    along = _coordinates(positions, length)
    taps = np.floor(along).astype(np.intp) + np.arange(-1, 3)[:, None]
    weights = kernel(taps - along) * ((taps >= 0) & (taps < len(image)))
    weights /= weights.sum(axis=0)
    result = np.zeros((length, image.shape[1]))
    for tap, weight in zip(np.clip(taps, 0, len(image) - 1), weights, strict=True):
        result += weight[:, None] * image[tap]
    return result


def _interpolation(
    kernel: Callable[[Positions], Positions], fill: Callable[[NDArray[np.float32], NDArray[np.bool_]], Image] = filled
) -> Baseline:
    def run(low: LowResolution, guide: NDArray[Any]) -> Image:
        tall = _along_rows(fill(low.depth, low.valid), low.rows, low.size[0], kernel)
        return np.ascontiguousarray(_along_rows(tall.T, low.columns, low.size[1], kernel).T)

    return run


nearest = _interpolation(_box)
bilinear = _interpolation(_triangle)
bicubic = _interpolation(_cubic)


def _inpainted(depth: NDArray[np.float32], valid: NDArray[np.bool_]) -> Image:
    """Fill holes from their rims inwards (Telea, "An image inpainting technique based on fast marching", 2004)."""
    if valid.all():
        return depth.astype(np.float64)
    # OpenCV rounds floats to whole numbers here, so that depth is spread over those of 16 bits.
    start = filled(depth, valid)
    low = float(start.min())
    step = max(float(start.max()) - low, 1e-12) / 65535
    levels = np.round((start - low) / step).astype(np.uint16)
    levels = np.asarray(cv2.inpaint(levels, (~valid).astype(np.uint8), 3, cv2.INPAINT_TELEA), np.uint16)
    return np.where(valid, start, low + step * levels)


inpainting = _interpolation(_cubic, _inpainted)


# --- filters ---


def guided_filter(image: Image, guide: Image, *, radius: int, epsilon: float) -> Image:
    """Filter with local linear models of a colour guide (He et al., "Guided image filtering", 2013).

    Args:
        image: (H, W) what is filtered.
        guide: (H, W, 3) in [0, 1].
        radius: Windows have 2 radius + 1 pixels on a side; at the border they are cut off.
        epsilon: Weight of the models' slopes in their fit, as a variance of the guide.
    """
    size = (2 * radius + 1, 2 * radius + 1)

    def total(values: Image) -> Image:
        summed = cv2.boxFilter(values, cv2.CV_64F, size, normalize=False, borderType=cv2.BORDER_CONSTANT)
        return np.asarray(summed, np.float64)

    count = total(np.ones(image.shape))
    channels = [np.ascontiguousarray(guide[..., c]) for c in range(3)]
    means = np.stack([total(channel) / count for channel in channels], axis=-1)
    mean = total(image) / count
    covariance = np.stack([total(channel * image) / count for channel in channels], axis=-1) - means * mean[..., None]
    spread = np.empty((*image.shape, 3, 3))
    for i, j in itertools.combinations_with_replacement(range(3), 2):
        spread[..., i, j] = total(channels[i] * channels[j]) / count - means[..., i] * means[..., j]
        spread[..., j, i] = spread[..., i, j]
    slope = np.linalg.solve(spread + epsilon * np.eye(3), covariance[..., None])[..., 0]
    offset = mean - (slope * means).sum(axis=-1)
    result = total(offset) / count
    for c, channel in enumerate(channels):
        result += total(np.ascontiguousarray(slope[..., c])) / count * channel
    return result


def joint_bilateral_filter(
    image: Image, guide: Image, *, step: int, sigma_space: float, sigma_colour: float, reach: int = 4
) -> Image:
    """Average over pixels that are near and alike in the guide (Petschnigg et al.; Eisemann and Durand, 2004).

    Args:
        image: (H, W) what is filtered.
        guide: (H, W, 3) in [0, 1].
        step: Of the window every ``step``-th row and column counts.
        sigma_space: Deviation of the Gaussian over distance, pixels.
        sigma_colour: Deviation of the Gaussian over the Euclidean distance of colours.
        reach: Window radius in steps.
    """
    height, width = image.shape
    total, mass = np.zeros_like(image), np.zeros_like(image)
    for dy, dx in itertools.product(range(-reach * step, reach * step + 1, step), repeat=2):
        if abs(dy) >= height or abs(dx) >= width:
            continue
        here = np.s_[max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
        there = np.s_[max(0, dy) : height + min(0, dy), max(0, dx) : width + min(0, dx)]
        change = np.square(guide[here] - guide[there]).sum(axis=-1) / (2 * sigma_colour**2)
        weight = np.exp(-change - (dy * dy + dx * dx) / (2 * sigma_space**2))
        total[here] += weight * image[there]
        mass[here] += weight
    return np.asarray(total / mass, np.float64)


def fast_global_smoother(image: Image, guide: Image, *, strength: float, sigma: float, passes: int = 3) -> Image:
    """Smooth by least squares along rows and columns in turn, less across edges of the guide (Min et al., 2014).

    Args:
        image: (H, W) what is smoothed.
        guide: (H, W, 3) in [0, 1].
        strength: Weight of smoothness against fidelity; the paper's lambda.
        sigma: Colour distance over which smoothness falls to 1/e.
        passes: Times that rows and columns are smoothed; the strength falls by 4 from one to the next.
    """
    result = image
    weights = [np.exp(-np.sqrt(np.square(np.diff(guide, axis=axis)).sum(axis=-1)) / sigma) for axis in (0, 1)]
    for number in range(1, passes + 1):
        share = strength * 1.5 * 4.0 ** (passes - number) / (4.0**passes - 1)
        result = _smooth_columns(result.T, share * weights[1].T).T
        result = _smooth_columns(result, share * weights[0])
    return np.ascontiguousarray(result)


def _smooth_columns(image: Image, link: Image) -> Image:
    """Solve u + sum over neighbours of link (u - u_neighbour) = image, each column for itself.

    Args:
        image: (H, W).
        link: (H - 1, W) between each row and the next.
    """
    image, link = np.ascontiguousarray(image), np.ascontiguousarray(link)
    diagonal = np.ones_like(image)
    diagonal[1:] += link
    diagonal[:-1] += link
    result: Image = image.copy()
    # Gauss elimination of a tridiagonal matrix: down, then up.
    for row in range(1, len(image)):
        ratio = link[row - 1] / diagonal[row - 1]
        diagonal[row] -= ratio * link[row - 1]
        result[row] += ratio * result[row - 1]
    result[-1] /= diagonal[-1]
    for row in range(len(image) - 2, -1, -1):
        result[row] = (result[row] + link[row] * result[row + 1]) / diagonal[row]
    return result


def unit_guide(guide: NDArray[Any]) -> Image:
    """Bring a guide of 8 or 16 bits to [0, 1]."""
    return np.asarray(guide / np.iinfo(guide.dtype).max, np.float64)


def _guided(low: LowResolution, guide: NDArray[Any]) -> Image:
    radius = max(1, round(low.factor / 4))
    return guided_filter(bicubic(low, guide), unit_guide(guide), radius=radius, epsilon=1e-3)


def _joint_bilateral(low: LowResolution, guide: NDArray[Any]) -> Image:
    step = max(1, round(low.factor / 4))
    return joint_bilateral_filter(
        bicubic(low, guide), unit_guide(guide), step=step, sigma_space=low.factor / 2, sigma_colour=0.06
    )


def _smoother(low: LowResolution, guide: NDArray[Any]) -> Image:
    return fast_global_smoother(bicubic(low, guide), unit_guide(guide), strength=(low.factor / 4) ** 3, sigma=0.03)


BASELINES: dict[str, Baseline] = {
    "nearest": nearest,
    "bilinear": bilinear,
    "bicubic": bicubic,
    "inpainting": inpainting,
    "guided-filter": _guided,
    "joint-bilateral": _joint_bilateral,
    "fast-global-smoother": _smoother,
}
