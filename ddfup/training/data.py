"""Training samples: frames held in memory, and batches that are a pure function of (seed, step, rank).

Because a batch depends on nothing but its number, a resumed run sees exactly the samples an uninterrupted one
would have seen, with any number of loader processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ddfup.degrade import DEGRADATIONS
from ddfup.errors import DDFUpError, InputError
from ddfup.guides import read_guide
from ddfup.io import files_by_stem, read_depth
from ddfup.training.config import DataSection, DataSet

# Crops drawn in search of one that is mostly measured, before the data are called unfit.
_TRIES = 1000
# Below this ratio only a sensor's noise and holes leave anything to learn.
_TRIVIAL_RATIO = 1.5
# Kinds of low resolution that give the mirrored for the mirrored; those with single pixels do not.
_SYMMETRIC = ("area", "bilinear", "bicubic")
# Side of the cells in which :func:`detail_of` measures, and what is added so that no crop is impossible.
_DETAIL_CELL = 8
_DETAIL_FLOOR = 0.01


@dataclasses.dataclass(frozen=True)
class Frame:
    """One training image.

    Attributes:
        guide: (H, W, 3) uint8, sRGB.
        depth: (H, W) float32 metres, 0 = no measurement.
        detail: Of the depth, see :func:`detail_of`.
    """

    guide: NDArray[np.uint8]
    depth: NDArray[np.float32]
    detail: NDArray[np.float64] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "detail", detail_of(self.depth))


def detail_of(depth: NDArray[np.float32]) -> NDArray[np.float64]:
    """How much there is to learn where: the error of interpolating from cells of 8 x 8 pixels.

    Args:
        depth: (H, W), 0 = no measurement.

    Returns:
        (H // 8 + 1, W // 8 + 1), the summed-area table of the cells' mean error in deviations of the depth.
    """
    rows, columns = (max(1, length // _DETAIL_CELL) for length in depth.shape)
    measured = (depth > 0).astype(np.float32)
    # Means over what is measured, so that holes are no edges.
    total, mass = (cv2.resize(a, (columns, rows), interpolation=cv2.INTER_AREA) for a in (depth, measured))
    total, mass = (cv2.resize(a, depth.shape[::-1], interpolation=cv2.INTER_LINEAR) for a in (total, mass))
    error = measured * np.abs(depth - total / np.maximum(mass, 1e-6))
    cells = cv2.resize(error, (columns, rows), interpolation=cv2.INTER_AREA)
    deviation = float(depth[depth > 0].std()) if (depth > 0).any() else 0.0
    table = np.zeros((rows + 1, columns + 1))
    table[1:, 1:] = (cells / max(deviation, 1e-12)).cumsum(axis=0).cumsum(axis=1)
    return table


def load_frames(root: Path, data_set: DataSet) -> list[Frame]:
    """Read the frames of a set into memory.

    Args:
        root: Folder that ``data_set.path`` is relative to.
        data_set: Which frames, and the border to cut off.

    Raises:
        InputError: If the folders are missing, a stem has no partner or a file cannot be read.
        PairingError: If two files of a folder have one stem.
    """
    folder = root / data_set.path
    depths, guides = (files_by_stem(folder / name) for name in ("depth", "rgb"))
    if not depths:
        raise InputError(
            f"{folder}: no files in depth/", "each data set is a folder with rgb/ and depth/ of equal stems"
        )
    for stem in depths:
        if stem not in guides:
            raise InputError(f"{folder / 'rgb'}: no image with the stem {stem!r} of {depths[stem]}")
    stems = sorted(depths)[data_set.first : None if data_set.last is None else data_set.last + 1]
    if not stems:
        raise InputError(
            f"{folder}: no frame from {data_set.first} to {data_set.last}; there are {len(depths)}",
            "frames count from 0 in sorted order",
        )
    frames = []
    for stem in stems:
        depth = read_depth(depths[stem])
        guide = read_guide(guides[stem])
        metres = np.where(depth.valid, depth.depth, 0).astype(np.float32)
        if guide.shape[:2] != metres.shape:
            raise InputError(f"{guides[stem]}: {guide.shape[:2]} pixels, but its depth has {metres.shape}")
        b = data_set.border
        if not 0 <= 2 * b < min(metres.shape):
            raise InputError(f"{depths[stem]}: border = {b} leaves nothing of {metres.shape} pixels")
        window = (slice(b, guide.shape[0] - b), slice(b, guide.shape[1] - b))
        rgb = guide[window]
        if rgb.dtype != np.uint8:
            rgb = (rgb >> 8).astype(np.uint8)
        frames.append(Frame(np.ascontiguousarray(rgb), np.ascontiguousarray(metres[window])))
    return frames


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's samples.

    Attributes:
        depth: (N, 1, h, w) low resolution, 0 = no measurement.
        guide: (N, 3, H, W) in [0, 1].
        target: (N, 1, H, W), 0 = no measurement.
        std: (N, 1, 1, 1) deviation of the depth of the whole images, the unit of the loss.
        weight: (N, 1, 1, 1) of the samples in the loss: crops with much to learn are drawn more often and weigh less.
        ratio: High-resolution over low-resolution length.
        symmetric: Of every sample, whether mirrored depth would have given the mirrored low resolution. Depth of single
            pixels is not: where two lie beside the middle of a cell, it is the upper left one.
    """

    depth: Tensor
    guide: Tensor
    target: Tensor
    std: Tensor
    weight: Tensor
    ratio: float
    symmetric: tuple[bool, ...]

    def to(self, device: torch.device) -> Batch:
        """Copy to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory (called by the loader)."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **tensors)


def _draw(shares: dict[str, float], rng: np.random.Generator) -> str:
    names = sorted(shares)
    weights = np.array([shares[name] for name in names])
    return names[int(rng.choice(len(names), p=weights / weights.sum()))]


class StepBatches(Dataset[Batch]):
    """Item ``step`` is the batch of that step.

    Args:
        sets: Frames and weight of every set.
        section: How samples are drawn.
        seed: Of all randomness.
        rank: Number of this process among ``world``.
        world: Processes that train together; each draws its own samples.
    """

    def __init__(
        self,
        sets: Sequence[tuple[list[Frame], float]],
        section: DataSection,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.sets = [frames for frames, _ in sets]
        weights = np.array([weight for _, weight in sets])
        self.weights = weights / weights.sum()
        self.section = section
        self.seed, self.rank, self.world = seed, rank, world

    def __getitem__(self, step: int) -> Batch:
        """Make the batch of a step."""
        # The ratio is common to all processes: they wait for one another at every step.
        shared = np.random.default_rng([self.seed, step])
        name = _draw(self.section.ratios, shared)
        ratio = float(2 ** shared.uniform(0, 5)) if name == "any" else float(name)
        wanted = self._crop(ratio)
        low = max(2, round(wanted / ratio))
        if name == "any":
            low = _of_few(low, most=wanted)
        # A ratio of no name gives way to the crop's side: for every new size of the guide cuDNN plans anew, which takes
        # longer than a step on a GPU.
        crop = wanted if name == "any" else round(low * ratio)
        count = max(1, round(self.section.pixels / crop**2))
        rng = np.random.default_rng([self.seed, step, 1 + self.rank])
        samples, symmetric = zip(*(self._sample(crop, low, rng) for _ in range(count)), strict=True)
        depth, guide, target, std, weight = (torch.from_numpy(np.stack(part)) for part in zip(*samples, strict=True))
        return Batch(depth, guide, target, std, weight, crop / low, symmetric)

    def _crop(self, ratio: float) -> int:
        table = sorted((float(limit), side) for limit, side in self.section.crops.items())
        return next((side for limit, side in table if ratio <= limit), table[-1][1])

    def _frame(self, rng: np.random.Generator) -> Frame:
        frames = self.sets[int(rng.choice(len(self.sets), p=self.weights))]
        return frames[int(rng.integers(len(frames)))]

    def _window(self, crop: int, rng: np.random.Generator) -> tuple[Frame, _Window, float]:
        """Choose one of several random windows by how much there is to learn in it.

        The factor by which it is chosen more often than the others is returned inverted, as the weight that makes
        the expected gradient that of plain sampling: the same goal, less noise on the way.
        """
        candidates = []
        for _ in range(self.section.candidates):
            frame = self._frame(rng)
            candidates.append((frame, _draw_window(frame, crop, self.section.shrink, rng)))
        details = np.array([_DETAIL_FLOOR + window.mean_of(frame.detail) for frame, window in candidates])
        chosen = int(rng.choice(len(candidates), p=details / details.sum()))
        return *candidates[chosen], float(details.mean() / details[chosen])

    def _sample(self, crop: int, low: int, rng: np.random.Generator) -> tuple[tuple[NDArray[np.float32], ...], bool]:
        for _ in range(_TRIES):
            frame, window, weight = self._window(crop, rng)
            # What stereo users have: near objects stand out.
            inverse = bool(rng.uniform() < self.section.disparity)
            image, depth = _cut(frame, window, crop, rng, inverse=inverse)
            if (depth > 0).mean() > 0.5:
                break
        else:
            raise InputError(
                f"of {_TRIES} crops of {crop} pixels none had depth in more than half of its pixels",
                "check the depth files' unit and invalid values",
            )
        guide: NDArray[np.uint8] | NDArray[np.float32] = image
        reference = frame.depth[::4, ::4]
        if inverse:
            # Of about the size of the depth.
            scale = np.float32(np.median(reference[reference > 0]) ** 2)
            depth, reference = depth * scale, _inverse(reference) * scale
        measured = reference[reference > 0]
        std = max(float(measured.std()), 1e-3 * float(measured.mean()))

        # Nothing is drawn where there are none, so that samples stay those of before there could be.
        if self.section.slopes and rng.uniform() < self.section.slopes:
            depth = _sloped(depth, std, rng)

        kind = "sensor" if crop < _TRIVIAL_RATIO * low else _draw(self.section.degradations, rng)
        lr = DEGRADATIONS[kind](depth, (low, low), rng)
        if not (lr > 0).any():
            kind = "area"
            lr = DEGRADATIONS[kind](depth, (low, low), rng)
        if self.section.augment_guide:
            if rng.uniform() < 0.02:
                other = self._frame(rng)
                image = _cut(other, _draw_window(other, crop, 1.0, rng), crop, rng)[0]
            guide = augment_guide(image, rng)
        guide01 = guide.astype(np.float32) / np.float32(255) if guide.dtype == np.uint8 else guide.astype(np.float32)
        parts = (
            lr[None],
            np.ascontiguousarray(guide01.transpose(2, 0, 1)),
            depth[None],
            np.full((1, 1, 1), std),
            np.full((1, 1, 1), weight),
        )
        return tuple(np.ascontiguousarray(p, dtype=np.float32) for p in parts), kind in _SYMMETRIC


class ErrorsAsValues(Dataset[Batch | DDFUpError]):
    """Batches, or the error that stands in the way of one, returned instead of raised.

    What is raised in a loader process arrives as another exception, its hint lost and its message a traceback.

    Args:
        batches: What makes the batches.
    """

    def __init__(self, batches: Dataset[Batch]) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> Batch | DDFUpError:
        """Make the batch of a step; :func:`batch_of` raises what comes instead."""
        try:
            return self.batches[step]
        except DDFUpError as error:
            return error


def batch_of(item: Batch | DDFUpError) -> Batch:
    """Return a batch that :class:`ErrorsAsValues` gave, or raise the error that it gave instead."""
    if isinstance(item, DDFUpError):
        raise item
    return item


@dataclasses.dataclass(frozen=True)
class _Window:
    """A square of an image, in pixels."""

    top: int
    left: int
    side: int

    def mean_of(self, table: NDArray[np.float64]) -> float:
        """Mean over the window, to whole cells, of what a summed-area table of :func:`detail_of` holds."""
        limit = np.array(table.shape) - 1
        corner = np.array((self.top, self.left))
        low = np.minimum(corner // _DETAIL_CELL, limit - 1)
        high = np.clip(-(-(corner + self.side) // _DETAIL_CELL), low + 1, limit)
        (y0, x0), (y1, x1) = low, high
        return float(table[y1, x1] - table[y0, x1] - table[y1, x0] + table[y0, x0]) / float(np.prod(high - low))


def _of_few(side: int, *, most: int) -> int:
    """Round a side to four binary digits: of so few sizes, steps are alike, and a GPU repeats what it recorded."""
    step = max(1, 1 << max(0, (side - 1).bit_length() - 4))
    return min(most, round(side / step) * step)


def _draw_window(frame: Frame, crop: int, shrink: float, rng: np.random.Generator) -> _Window:
    """A random square that becomes a crop of ``crop`` pixels after shrinking by up to ``shrink``."""
    height, width = frame.depth.shape
    if crop > min(height, width):
        raise InputError(
            f"crop of {crop} pixels does not fit a training image of {width} x {height}",
            "lower [data] crops, or leave the set out",
        )
    factor = min(float(rng.uniform(1, shrink)) if rng.uniform() < 0.5 else 1.0, min(height, width) / crop)
    side = round(crop * factor)
    return _Window(int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1)), side)


def _inverse(depth: NDArray[np.float32]) -> NDArray[np.float32]:
    """One over depth, 0 where there is no measurement."""
    return np.where(depth > 0, 1 / np.maximum(depth, 1e-6), 0).astype(np.float32)


def _sloped(depth: NDArray[np.float32], std: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Add a plane that rises by 0.5 to 4 ``std`` over the crop, in any direction."""
    angle, height = rng.uniform(0, 2 * np.pi), std * 2 ** rng.uniform(-1, 2)
    y, x = (np.arange(length, dtype=np.float32) / length for length in depth.shape)
    plane = height * (np.sin(angle) * y[:, None] + np.cos(angle) * x)
    return np.where(depth > 0, depth + plane - plane.min(), 0).astype(np.float32)


def _shrunk(depth: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """A square of depth made smaller as images are: the mean of what is measured of each pixel's area, if half is.

    Single pixels in the place of means would make edges that are sharper than those of any sensor or resized map, and
    so would the results be.
    """
    measured = (depth > 0).astype(np.float32)
    total, mass = (cv2.resize(a, (side, side), interpolation=cv2.INTER_AREA) for a in (depth, measured))
    return np.where(mass >= 0.5, total / np.maximum(mass, 0.5), 0).astype(np.float32)


def _cut(
    frame: Frame, window: _Window, crop: int, rng: np.random.Generator, *, inverse: bool = False
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Cut a window, its depth or 1 / depth, shrunk to ``crop`` pixels, flipped and turned at random."""
    top, left, side = window.top, window.left, window.side
    guide = frame.guide[top : top + side, left : left + side]
    depth = frame.depth[top : top + side, left : left + side]
    if inverse:
        # Before it is made smaller: means of disparity are not those of depth.
        depth = _inverse(depth)
    if side != crop:
        guide = cv2.resize(guide, (crop, crop), interpolation=cv2.INTER_AREA).astype(np.uint8)
        depth = _shrunk(depth, crop)
    turns, flip = int(rng.integers(4)), bool(rng.integers(2))
    guide, depth = np.rot90(guide, turns), np.rot90(depth, turns)
    if flip:
        guide, depth = guide[:, ::-1], depth[:, ::-1]
    return np.ascontiguousarray(guide), np.ascontiguousarray(depth)


def augment_guide(guide: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float32]:
    """Change a guide as cameras and light do.

    Args:
        guide: (H, W, 3) uint8.
        rng: Source of all randomness.

    Returns:
        (H, W, 3) float32 in [0, 1].
    """
    image = np.asarray(guide / np.float32(255), dtype=np.float32)
    if rng.uniform() < 0.5:
        gamma = 2 ** rng.uniform(-0.7, 0.7)
        gain = 2 ** rng.uniform(-0.6, 0.4) * 2 ** rng.uniform(-0.15, 0.15, 3)
        image = np.clip(np.power(image, gamma) * gain, 0, 1).astype(np.float32)
    if rng.uniform() < 0.1:
        image = np.repeat(image.mean(axis=2, keepdims=True, dtype=np.float32), 3, axis=2)
    if rng.uniform() < 0.1:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.4, 1.5))), dtype=np.float32)
    if rng.uniform() < 0.03:
        image = (image * rng.uniform(0.02, 0.2)).astype(np.float32)
    if rng.uniform() < 0.2:
        noise = rng.standard_normal(image.shape).astype(np.float32) * 10 ** rng.uniform(-2.5, -1.2)
        image = np.clip(image + noise, 0, 1).astype(np.float32)
    if rng.uniform() < 0.05:
        shift = np.float32([[1, 0, rng.uniform(-1, 1)], [0, 1, rng.uniform(-1, 1)]])  # type: ignore[arg-type]
        size = (image.shape[1], image.shape[0])
        image = np.asarray(
            cv2.warpAffine(image, shift, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE),
            dtype=np.float32,
        )
    return image
