"""How low-resolution depth is made from high-resolution depth, for training and evaluation alike.

Depth maps are (H, W) float arrays in any unit with 0, negative or non-finite values for "no measurement";
results are float32 with 0 there. The low-resolution grid shares its outer edges with the high-resolution one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddfup.errors import ArgumentError

Array = NDArray[np.float32]

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
}


def low_resolution_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Return (h, w) of the low resolution of (H, W): each length over ``factor``, rounded, at least 1."""
    return max(1, round(size[0] / factor)), max(1, round(size[1] / factor))


def resize(depth: Array, size: tuple[int, int], kind: str) -> Array:
    """Resample with Pillow's antialiased filters, holes left out of every weighted mean.

    Args:
        depth: (H, W), 0 = no measurement.
        size: (h, w) of the result.
        kind: "bilinear", "bicubic" or "area".

    Returns:
        (h, w); 0 where less than half of the filter's weight lies on measurements.
    """

    def run(image: Array) -> Array:
        return np.asarray(Image.fromarray(image).resize((size[1], size[0]), _RESAMPLING[kind]), dtype=np.float32)

    valid = depth > 0
    if valid.all():
        return run(depth)
    weight = run(valid.astype(np.float32))
    total = run(depth)
    return np.where(weight >= 0.5, total / np.maximum(weight, 0.5), 0).astype(np.float32)


def sample(depth: Array, size: tuple[int, int]) -> Array:
    """Take one pixel per cell: the one nearest to its centre, of several the upper left.

    At a whole factor s that is ``depth[(s-1)//2::s]``. This is the low resolution of the PAC-Net and DDF-Up
    papers, and what a sparse sensor delivers.

    Args:
        depth: (H, W).
        size: (h, w) of the result.

    Returns:
        (h, w), every value one of ``depth``.
    """
    indices = []
    for length, count in zip(depth.shape, size, strict=True):
        centre = (np.arange(count) + 0.5) * (length / count) - 0.5
        # Halves fall to the upper left, also where the ratio's rounding puts them a hair above.
        indices.append(np.clip(np.ceil(centre - 0.5 - 1e-6), 0, length - 1).astype(np.intp))
    return depth[np.ix_(*indices)]


def sensor(depth: Array, size: tuple[int, int], rng: np.random.Generator) -> Array:
    """Imitate a real range sensor: mixed samples at edges, noise that grows with depth, quantisation, holes.

    Noise and steps are relative to the median depth, so that the result scales with the unit.

    Args:
        depth: (H, W), 0 = no measurement.
        size: (h, w) of the result.
        rng: Source of all randomness.

    Returns:
        (h, w), 0 = no measurement.
    """
    mixed = resize(depth, size, "area")
    point = sample(depth, size)
    # A time-of-flight pixel averages over its cone (flying pixels); a stereo or laser sample does not.
    share = rng.uniform() if rng.uniform() < 0.7 else 0.0
    low = np.where((mixed > 0) & (point > 0), share * mixed + (1 - share) * point, 0).astype(np.float32)
    valid = low > 0
    if not valid.any():
        return low
    scale = float(np.median(low[valid]))

    noise = 10 ** rng.uniform(-3.3, -1.8)
    relative = low / scale
    sigma = noise * scale * (0.3 + 0.7 * relative**2)
    white = rng.standard_normal(low.shape).astype(np.float32)
    low = low + np.where(valid, sigma * white, 0)
    if rng.uniform() < 0.5:
        # Steps of a disparity: they, too, grow with depth squared.
        step = 10 ** rng.uniform(-3.5, -2) / scale
        inverse = 1 / np.maximum(low, 1e-3 * scale)
        low = np.where(valid, 1 / (np.maximum(np.round(inverse / step), 1) * step), 0)

    hole = rng.uniform(size=low.shape) < rng.choice([0.0, 0.02, 0.1])
    if rng.uniform() < 0.5:
        # Depth edges are where sensors lose pixels.
        padded = np.pad(relative, 1, mode="edge")
        jump = np.maximum(np.abs(padded[2:, 1:-1] - padded[:-2, 1:-1]), np.abs(padded[1:-1, 2:] - padded[1:-1, :-2]))
        hole |= (jump > 0.1) & (rng.uniform(size=low.shape) < rng.uniform(0.2, 1))
    for _ in range(int(rng.integers(0, 4))):
        # Dark or shining patches.
        hole |= _patch(low.shape, rng)
    remaining = valid & ~hole
    keep = remaining if remaining.any() else valid
    return np.where(keep, np.maximum(low, 1e-3 * scale), 0).astype(np.float32)


def _patch(size: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.bool_]:
    """A random ellipse."""
    centre = rng.uniform(0, 1, 2) * size
    radius = rng.uniform(0.02, 0.15) * max(size)
    y, x = np.ogrid[: size[0], : size[1]]
    inside: NDArray[np.bool_] = (y - centre[0]) ** 2 + ((x - centre[1]) * rng.uniform(0.5, 2)) ** 2 < radius**2
    return inside


def holes(depth: Array, size: tuple[int, int], rng: np.random.Generator) -> Array:
    """Area means, of which patches over a fifth of the map, at most a third, are missing: filling alone is tested.

    Args:
        depth: (H, W), 0 = no measurement.
        size: (h, w) of the result.
        rng: Source of all randomness.

    Returns:
        (h, w), 0 = no measurement.
    """
    low = resize(depth, size, "area")
    hole = np.zeros(size, np.bool_)
    # Few tries would do; where a map has but a few pixels, every patch may be too much.
    for _ in range(100):
        larger = hole | _patch(size, rng)
        if larger.mean() <= 1 / 3 and ((low > 0) & ~larger).any():
            hole = larger
        if hole.mean() >= 1 / 5:
            break
    return np.where(hole, np.float32(0), low)


def _resizer(kind: str) -> Callable[[Array, tuple[int, int], np.random.Generator], Array]:
    return lambda depth, size, rng: resize(depth, size, kind)


DEGRADATIONS: dict[str, Callable[[Array, tuple[int, int], np.random.Generator], Array]] = {
    "nearest": lambda depth, size, rng: sample(depth, size),
    "bilinear": _resizer("bilinear"),
    "bicubic": _resizer("bicubic"),
    "area": _resizer("area"),
    "sensor": sensor,
    "holes": holes,
}


def degrade(
    depth: NDArray[np.floating],
    factor: float,
    kind: str = "bicubic",
    *,
    rng: np.random.Generator | None = None,
) -> Array:
    """Make a low-resolution depth map.

    Args:
        depth: (H, W), any unit; 0, negative or non-finite = no measurement.
        factor: High-resolution over low-resolution length, at least 1, whole or not.
        kind: One of ``DEGRADATIONS``: "nearest" (one pixel per cell), "bilinear", "bicubic", "area"
            (antialiased), "sensor", "holes".
        rng: Randomness of the last two; None: a generator seeded with 0.

    Returns:
        (round(H / factor), round(W / factor)) float32, 0 = no measurement.

    Raises:
        ArgumentError: If the factor is below 1, the kind unknown or the array not two-dimensional.

    Example:
        >>> degrade(np.ones((480, 640)), 8, "area").shape
        (60, 80)
    """
    if depth.ndim != 2:
        raise ArgumentError(f"depth must be (H, W); got {depth.shape}")
    if not factor >= 1:
        raise ArgumentError(f"factor must be at least 1; got {factor}")
    if kind not in DEGRADATIONS:
        raise ArgumentError(f"kind must be one of {', '.join(DEGRADATIONS)}; got {kind!r}")
    clean = np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)
    size = low_resolution_size((depth.shape[0], depth.shape[1]), factor)
    return DEGRADATIONS[kind](clean, size, rng if rng is not None else np.random.default_rng(0))
