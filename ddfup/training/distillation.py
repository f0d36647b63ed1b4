"""Targets that trained networks have a part in: what is left to chance in the truth is not learned from it.

Where low resolution and photo leave open on which side of an edge a pixel lies, the truth says one or the other, and a
step's gradient is mostly that chance. The mean of what a network gives for a sample and for it turned and mirrored is
nearer to the truth than any of it, and has no such noise ("Data Distillation", Radosavovic et al., CVPR 2018). Here one
teacher is asked about one view at a time; their mean is what is learned over the steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddfup import models
from ddfup.training.config import DistillationSection
from ddfup.training.data import Batch

# As all networks: of low-resolution depth (N, 1, h, w), guide (N, 3, H, W) and mask (N, 1, h, w).
Teacher = Callable[[Tensor, Tensor, Tensor], Tensor]


class _View(NamedTuple):
    """How a square is seen: mirrored left to right, if at all, then turned by right angles to the left."""

    mirrored: bool
    turns: int

    def of(self, image: Tensor) -> Tensor:
        """See (C, H, H) so."""
        return torch.rot90(image.flip(-1) if self.mirrored else image, self.turns, (-2, -1))

    def undo(self, image: Tensor) -> Tensor:
        """See as it was what was seen so."""
        image = torch.rot90(image, -self.turns, (-2, -1))
        return image.flip(-1) if self.mirrored else image


_VIEWS = tuple(_View(mirrored, turns) for mirrored in (False, True) for turns in range(4))
# Rows and columns exchanged or not: the upper left pixel stays.
_TRANSPOSITIONS = (_View(False, 0), _View(True, 1))


class Distillation:
    """Mixes the truth of batches with what teachers say of them.

    Args:
        teachers: One of them is asked in a step.
        truth: Share of the truth.
        seed: Of who is asked about which views; a step depends on nothing but its number.
        rank: Number of this process, which has samples of its own.
    """

    def __init__(self, teachers: Sequence[Teacher], *, truth: float, seed: int, rank: int = 0) -> None:
        self._teachers, self._truth = list(teachers), truth
        self._seed, self._rank = seed, rank

    @classmethod
    def load(cls, section: DistillationSection, device: torch.device, *, seed: int, rank: int = 0) -> Distillation:
        """Load the teachers that a configuration names.

        Raises:
            WeightsError: If one is unknown or damaged.
        """
        networks = [models.load_model(models.find_model(name).path, device) for name in section.teachers]
        teachers = [network.to(memory_format=torch.channels_last) for network in networks]  # type: ignore[call-overload]
        return cls(teachers, truth=section.truth, seed=seed, rank=rank)

    @torch.no_grad()
    def __call__(self, batch: Batch, step: int) -> Batch:
        """Mix the targets of a batch of square crops, where there is a measurement.

        Args:
            batch: Of a step, on the teachers' device.
            step: Its number.
        """
        rng = np.random.default_rng([self._seed, step, self._rank, 1])
        teacher = self._teachers[int(rng.integers(len(self._teachers)))]
        views = []
        for symmetric in batch.symmetric:
            choice = _VIEWS if symmetric else _TRANSPOSITIONS
            views.append(choice[int(rng.integers(len(choice)))])
        depth, guide = (
            torch.stack([view.of(image) for view, image in zip(views, images, strict=True)])
            for images in (batch.depth, batch.guide)
        )
        guide = guide.contiguous(memory_format=torch.channels_last)
        answers = teacher(depth, guide, depth > 0).float()
        answer = torch.stack([view.undo(image) for view, image in zip(views, answers, strict=True)])
        # 0 means "no measurement", so that nothing else may become it.
        usable = (batch.target > 0) & (answer > 0) & answer.isfinite()
        mixed = torch.lerp(answer, batch.target, self._truth)
        return dataclasses.replace(batch, target=torch.where(usable, mixed, batch.target))
