"""Describe a low-resolution depth map by one vector, for the filters that serve the whole image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ddfup.models.blocks import activation, conv

# Side of the windows the encoder looks through, about that of a training crop's depth, and how many of them at
# most lie along a side: a sample describes a large map well enough.
_WINDOW = 24
_WINDOWS = 12


class ContextEncoder(nn.Module):
    """Describe a low-resolution depth map by one vector: how it was sampled, its noise, its holes, the ratio.

    The map is cut into windows of the size of training crops, each is described, and the descriptions are
    averaged: statistics over a whole image are not those of a crop, and filters predicted from them would be ones
    the network was never trained with.

    Args:
        channels: Width of the vector.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv(2, channels)
        self.second = conv(channels, channels)
        self.mix = nn.Linear(2 * channels + 2, channels)

    def forward(self, depth: Tensor, valid: Tensor, ratio: float) -> Tensor:
        """Encode.

        Args:
            depth: (N, 1, h, w) locally normalised, holes filled.
            valid: (N, 1, h, w) bool.
            ratio: High-resolution over low-resolution size.

        Returns:
            (N, channels).
        """
        both = torch.cat((depth, 1 - valid.to(depth.dtype)), dim=1)
        # Windows of equal size, of at most two heights and two widths, are described together: one by one, a GPU would
        # wait for the CPU, a hundred times for a large map.
        groups: dict[tuple[int, int], list[Tensor]] = {}
        for rows in _cut(both.shape[-2]):
            for columns in _cut(both.shape[-1]):
                window = both[..., slice(*rows), slice(*columns)]
                groups.setdefault((window.shape[-2], window.shape[-1]), []).append(window)
        pixels = sum(height * width * len(windows) for (height, width), windows in groups.items())
        total = both.new_zeros(())
        for (height, width), windows in groups.items():
            each = self._describe(torch.cat(windows), ratio).view(len(windows), len(both), -1)
            # In full precision: the number of pixels alone may be too much for half of it.
            total = total + each.to(both.dtype).sum(dim=0) * (height * width / pixels)
        return total

    def _describe(self, window: Tensor, ratio: float) -> Tensor:
        """From depth and holes (N, 2, h', w') to (N, channels)."""
        features = activation(self.second(activation(self.first(window))))
        mean = features.mean(dim=(2, 3))
        # The small addend bounds the gradient of the root where a window is flat.
        deviation = (features.square().mean(dim=(2, 3)) - mean.square()).clamp(min=0).add(1e-2).sqrt()
        share = window[:, 1:].mean(dim=(2, 3))
        scalars = torch.cat((share, torch.full_like(share, math.log2(ratio) / 3)), dim=1)
        return activation(self.mix(torch.cat((mean, deviation, scalars), dim=1)))


def _cut(length: int) -> list[tuple[int, int]]:
    """Cut a length into parts of about ``_WINDOW``; of more than ``_WINDOWS`` take so many, evenly spread."""
    count = max(1, round(length / _WINDOW))
    taken = range(count) if count <= _WINDOWS else [i * (count - 1) // (_WINDOWS - 1) for i in range(_WINDOWS)]
    return [(length * i // count, length * (i + 1) // count) for i in taken]
