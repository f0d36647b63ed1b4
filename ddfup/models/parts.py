"""What the default network knows of an image, and of a part of it, while it works on it tile by tile."""

from __future__ import annotations

import dataclasses
import math
from types import EllipsisType

import torch
from torch import Tensor

from ddfup.models.sampling import positions, sample_window

# Index of the last two dimensions.
Index = tuple[EllipsisType, slice, slice]


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of the image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def index(self, cell: int, multiple: int) -> Index:
        """Index of this part in what has a value per ``cell`` pixels, enlarged to multiples of ``multiple`` pixels.

        Args:
            cell: Side in pixels of what one value stands for.
            multiple: Of ``cell``; the part begins at one.
        """
        step = multiple // cell
        rows, columns = (
            slice(first // cell, first // cell + -(-length // multiple) * step)
            for first, length in ((self.top, self.height), (self.left, self.width))
        )
        return ..., rows, columns


@dataclasses.dataclass(frozen=True)
class Coarse:
    """The depth of an image, or of a part of it, upsampled to level 2 or to the trunk's own where that is finer.

    Attributes:
        features: (N, C, H', W').
        depth: (N, 1, H', W') filtered on the way, locally normalised.
        base: (N, 1, h', w') the same at the trunk's level, before any filter.
        origin: Pixel where ``base`` begins, top and left.
    """

    features: Tensor
    depth: Tensor
    base: Tensor
    origin: tuple[int, int]

    def crop(self, part: Index) -> Coarse:
        """Cut features and depth, in their own pixels."""
        return dataclasses.replace(self, features=self.features[part], depth=self.depth[part])


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a network knows of the whole image before it looks at a part of it.

    Attributes:
        depth: (N, 1, h, w) normalised, holes filled.
        local: (N, 1, h, w) the same, normalised within a window around every pixel.
        deviation: (N, 1, h, w) of the windows, unit of ``local``.
        valid: (N, 1, h, w) bool.
        mean: (N, 1, 1, 1) of the valid depth.
        std: (N, 1, 1, 1) of the valid depth.
        guide_mean: (N, 1, 1, 1).
        guide_std: (N, 1, 1, 1).
        context: (N, channels).
        ratio: High-resolution over low-resolution length, vertical and horizontal.
        level: Of the trunk.
        coarse: Of the whole image; None where it is left to the parts, and while it is not yet known.
        finer: The guide's features, (N, C, H', W'), of the whole image at the levels before that of ``coarse``, from
            level 1 on, where that is given.
    """

    depth: Tensor
    local: Tensor
    deviation: Tensor
    valid: Tensor
    mean: Tensor
    std: Tensor
    guide_mean: Tensor
    guide_std: Tensor
    context: Tensor
    ratio: tuple[float, float]
    level: int
    coarse: Coarse | None = None
    finer: tuple[Tensor, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the depth."""
        return self.depth.shape[-2], self.depth.shape[-1]

    def sample(self, image: Tensor, window: Window, step: float, mode: str = "cubic") -> Tensor:
        """Interpolate a low-resolution image in the middle of every cell of ``step`` pixels of a window."""
        origin, size = (window.top, window.left), (window.height, window.width)
        return sample_window(image, origin, size, self.ratio, step=step, mode=mode)

    def phase(self, window: Window, step: float) -> Tensor:
        """Say where the middles of the cells of ``step`` pixels lie between low-resolution pixels.

        At ratios of 2, 4, 8 ... it is the same everywhere, at others not, and what interpolation has lost, and with it
        the filter that brings it back, depends on it.

        Returns:
            (N, 4, H', W') cosine and sine, vertical and horizontal; 1 and 0 in the middle of a low-resolution pixel.
        """
        y = positions(window.top, round(window.height / step), step, self.ratio[0], self.local.device)
        x = positions(window.left, round(window.width / step), step, self.ratio[1], self.local.device)
        turns = [2 * math.pi * (place - place.round()).to(self.local.dtype) for place in (y, x)]
        maps = [part[:, None].expand(-1, len(x)) for part in (turns[0].cos(), turns[0].sin())]
        maps += [part.expand(len(y), -1) for part in (turns[1].cos(), turns[1].sin())]
        return torch.stack(maps).expand(len(self.local), -1, -1, -1)
