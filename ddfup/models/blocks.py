"""Convolution, normalisation and residual block that the parts of the default network are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LEAK = 0.1


def conv(
    cin: int, cout: int, kernel_size: int = 3, *, stride: int = 1, padding: int | None = None, gain: float = 1.0
) -> nn.Conv2d:
    """A convolution with Kaiming weights times ``gain``; PyTorch's own initialisation lets the signal fade.

    Args:
        cin: Channels in.
        cout: Channels out.
        kernel_size: Side of the window.
        stride: Step of the window.
        padding: Zeros on every side; None: half the window, which keeps the size at stride 1.
        gain: Factor on the initial weights.
    """
    layer = nn.Conv2d(cin, cout, kernel_size, stride, kernel_size // 2 if padding is None else padding)
    nn.init.kaiming_normal_(layer.weight, a=_LEAK)
    with torch.no_grad():
        layer.weight.mul_(gain)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def activation(x: Tensor) -> Tensor:
    """Leaky ReLU: a plain one can die for good behind the small first gradients of a zero residual.

    Args:
        x: What nobody else reads: without gradients it is overwritten, since new memory costs more than the work.
    """
    return F.leaky_relu(x, _LEAK, inplace=not torch.is_grad_enabled())


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of every pixel.

    Without any normalisation the mean activation grows by a factor per layer within a few dozen steps of Adam,
    and nothing is learned; normalising over the image would make tiles differ from the whole.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W); fastest where channels are last in memory."""
        normalized: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return normalized.permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Normalisation and two 3 x 3 convolutions around a leaky ReLU, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.first = conv(channels, channels)
        self.second = conv(channels, channels, gain=0.3)

    def forward(self, x: Tensor) -> Tensor:
        """Refine (N, C, H, W)."""
        change: Tensor = self.second(activation(self.first(self.norm(x))))
        return x + change
