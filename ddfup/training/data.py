"""Training samples: frames held in memory, and batches that are a pure function of (seed, step, rank).

Because a batch depends on nothing but its number, a resumed run sees exactly the samples an uninterrupted one
would have seen, with any number of loader processes.
"""

from __future__ import annotations

import dataclasses
import math
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
from ddfup.errors import InputError
from ddfup.guides import read_guide
from ddfup.io import read_depth
from ddfup.training.config import DataSection, DataSet

# Crops drawn in search of one that is mostly measured, before the data are called unfit.
_TRIES = 1000


# Share of crops normalised as part of their image, as most are met; the rest by themselves, as small images
# are.
_WHOLE = 0.75


@dataclasses.dataclass(frozen=True)
class Frame:
    """One training image.

    Attributes:
        guide: (H, W, 3) uint8, sRGB.
        depth: (H, W) float32 metres, 0 = no measurement.
    """

    guide: NDArray[np.uint8]
    depth: NDArray[np.float32]


def load_frames(root: Path, data_set: DataSet) -> list[Frame]:
    """Read the frames of a set into memory.

    Args:
        root: Folder that ``data_set.path`` is relative to.
        data_set: Which frames, and the border to cut off.

    Raises:
        InputError: If the folders are missing, a stem has no partner or a file cannot be read.
    """
    folder = root / data_set.path
    depths = {p.stem: p for p in sorted((folder / "depth").glob("*.*"))}
    guides = {p.stem: p for p in sorted((folder / "rgb").glob("*.*"))}
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
        mean: (N, 1, 1, 1) mean depth of the whole images.
        std: (N, 1, 1, 1) deviation of the depth of the whole images, the unit of the loss.
        whole: (N, 1, 1, 1) bool: normalise by the statistics of the whole image rather than by the crop's
            own.
        ratio: High-resolution over low-resolution length.
    """

    depth: Tensor
    guide: Tensor
    target: Tensor
    mean: Tensor
    std: Tensor
    whole: Tensor
    ratio: float

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
        crop = round(low * ratio)
        count = max(1, round(self.section.pixels / crop**2))
        rng = np.random.default_rng([self.seed, step, 1 + self.rank])
        samples = [self._sample(crop, low, rng) for _ in range(count)]
        depth, guide, target, mean, std, whole = (
            torch.from_numpy(np.stack(part)) for part in zip(*samples, strict=True)
        )
        return Batch(depth, guide, target, mean, std, whole, crop / low)

    def _crop(self, ratio: float) -> int:
        table = sorted((float(limit), side) for limit, side in self.section.crops.items())
        return next((side for limit, side in table if ratio <= limit), table[-1][1])

    def _frame(self, rng: np.random.Generator) -> Frame:
        frames = self.sets[int(rng.choice(len(self.sets), p=self.weights))]
        return frames[int(rng.integers(len(frames)))]

    def _sample(self, crop: int, low: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], ...]:
        for _ in range(_TRIES):
            frame = self._frame(rng)
            image, depth = _cut(frame, crop, self.section.shrink, rng)
            if (depth > 0).mean() > 0.5:
                break
        else:
            raise InputError(
                f"of {_TRIES} crops of {crop} pixels none had depth in more than half of its pixels",
                "check the depth files' unit and invalid values",
            )
        guide: NDArray[np.uint8] | NDArray[np.float32] = image
        reference = frame.depth[::4, ::4]
        if rng.uniform() < self.section.disparity:
            # A disparity of the same mean: what stereo users have, near objects stand out.
            scale = float(np.median(reference[reference > 0])) ** 2
            depth, reference = (
                np.where(d > 0, scale / np.maximum(d, 1e-6), 0).astype(np.float32) for d in (depth, reference)
            )
        mean = float(reference[reference > 0].mean())
        std = max(float(reference[reference > 0].std()), 1e-3 * mean)

        kind = _draw(self.section.degradations, rng)
        lr = DEGRADATIONS[kind](depth, (low, low), rng)
        if not (lr > 0).any():
            lr = DEGRADATIONS["area"](depth, (low, low), rng)
        if self.section.augment_guide:
            if rng.uniform() < 0.02:
                image = _cut(self._frame(rng), crop, 1.0, rng)[0]
            guide = augment_guide(image, rng)
        guide01 = guide.astype(np.float32) / np.float32(255) if guide.dtype == np.uint8 else guide.astype(np.float32)
        whole = np.array([[[rng.uniform() < _WHOLE]]])
        parts = (
            lr[None],
            np.ascontiguousarray(guide01.transpose(2, 0, 1)),
            depth[None],
            np.full((1, 1, 1), mean),
            np.full((1, 1, 1), std),
        )
        return *(np.ascontiguousarray(p, dtype=np.float32) for p in parts), whole


def _cut(
    frame: Frame, crop: int, shrink: float, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Cut a random square, shrunk by a random factor, flipped and turned at random."""
    height, width = frame.depth.shape
    if crop > min(height, width):
        raise InputError(
            f"crop of {crop} pixels does not fit a training image of {width} x {height}",
            "lower [data] crops, or leave the set out",
        )
    factor = min(float(rng.uniform(1, shrink)) if rng.uniform() < 0.5 else 1.0, min(height, width) / crop)
    side = round(crop * factor)
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    guide = frame.guide[top : top + side, left : left + side]
    depth = frame.depth[top : top + side, left : left + side]
    if side != crop:
        guide = cv2.resize(guide, (crop, crop), interpolation=cv2.INTER_AREA).astype(np.uint8)
        index = np.clip(((np.arange(crop) + 0.5) * side / crop).astype(np.intp), 0, side - 1)
        depth = depth[np.ix_(index, index)]
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


def tuning_pairs(frames: Sequence[Frame], count: int) -> list[Frame]:
    """Choose ``count`` frames, spread evenly over the set."""
    step = max(1, math.ceil(len(frames) / max(1, count)))
    return list(frames[::step])[:count]
