"""Convolution, normalisation and residual block that the parts of the default network are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddfup.ops.norm import channel_norm

_LEAK = 0.1


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution as the matrix product that it is where channels are last in memory.

    PyTorch does not hand such convolutions of one image to oneDNN when it has one thread, and its own code copies.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels of (N, C, H, W)."""
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


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
    kind = Pointwise if kernel_size == stride == 1 and not padding else nn.Conv2d
    layer = kind(cin, cout, kernel_size, stride, kernel_size // 2 if padding is None else padding)
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


def add(own: Tensor, other: Tensor) -> Tensor:
    """Add two tensors of one shape.

    Args:
        own: What nobody else reads: without gradients the sum is written there, as in :func:`activation`.
        other: Stays as it is.
    """
    return own + other if torch.is_grad_enabled() or own.dtype != other.dtype else own.add_(other)


def add_pointwise(own: Tensor, x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Add what a 1 x 1 convolution makes of a tensor to another one.

    Args:
        own: (N, C', H, W), what nobody else reads: without gradients the sum is written there, and the product takes no
            memory of its own, if the layout of the two allows it.
        x: (N, C, H, W), stays as it is.
        layer: From C to C' channels.
    """
    pixels = own.permute(0, 2, 3, 1)
    tracked = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()
    if tracked or not pixels.is_contiguous():
        return add(own, layer(x))
    rows = pixels.view(-1, layer.out_channels)
    rows.addmm_(x.permute(0, 2, 3, 1).reshape(-1, layer.in_channels), layer.weight.flatten(1).t())
    if layer.bias is not None:
        rows.add_(layer.bias)
    return own


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
        return channel_norm(x, self.norm.weight, self.norm.bias, eps=self.norm.eps)


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
        return add(change, x)
