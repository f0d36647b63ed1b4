"""A feature pyramid neck, called as torchvision's, whose upsampler is chosen by name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ddfup.errors import ArgumentError
from ddfup.models.layers import DDFUp
from ddfup.ops import ddf_up


class Resize(nn.Module):
    """Interpolate to any size.

    Args:
        mode: "nearest" or "bilinear".
    """

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize (N, C, h, w) to (N, C, *size)."""
        return F.interpolate(features, size=size, mode=self.mode)


class Double(nn.Module):
    """A layer that doubles the resolution, then one row or column cut off or repeated where the goal is odd.

    Args:
        layer: Takes (N, C, h, w) to (N, C, 2h, 2w).
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample (N, C, h, w) to (N, C, *size).

        Raises:
            ArgumentError: If ``size`` is not (2h, 2w), give or take one.
        """
        height, width = 2 * features.shape[-2], 2 * features.shape[-1]
        if max(abs(size[0] - height), abs(size[1] - width)) > 1:
            raise ArgumentError(
                f"a level must have twice the size of the next, {(height, width)} give or take one; got {tuple(size)}",
                "upsampler='nearest' and 'bilinear' take any size",
            )
        doubled: Tensor = self.layer(features)[..., : size[0], : size[1]]
        missing = (0, max(size[1] - width, 0), 0, max(size[0] - height, 0))
        return F.pad(doubled, missing, mode="replicate") if any(missing) else doubled


class PixelShuffle(nn.Module):
    """Upsample by a 3 x 3 convolution to scale * scale times the channels, which become pixels.

    Args:
        channels: C, in and out.
        scale: Integer factor.
    """

    def __init__(self, channels: int, *, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.expand = nn.Conv2d(channels, channels * scale * scale, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Upsample (N, C, H, W) to (N, C, scale*H, scale*W)."""
        return F.pixel_shuffle(self.expand(features), self.scale)


class Carafe(nn.Module):
    """Upsample by content-aware reassembly (Wang et al., "CARAFE", ICCV 2019).

    Every output pixel is a weighted mean of the window around the input pixel it lies in, with weights predicted
    from the features and shared by all channels: a DDF-Up whose channel filters are all one.

    Args:
        channels: C, in and out.
        scale: Integer factor.
        kernel_size: Side of the window.
        encoder_size: Side of the convolution that predicts the weights.
        compressed: Channels that it sees.
    """

    def __init__(
        self, channels: int, *, scale: int = 2, kernel_size: int = 5, encoder_size: int = 3, compressed: int = 64
    ) -> None:
        super().__init__()
        self.scale, self.kernel_size = scale, kernel_size
        self.compress = nn.Conv2d(channels, compressed, 1)
        self.encode = nn.Conv2d(compressed, scale**2 * kernel_size**2, encoder_size, padding=encoder_size // 2)

    def forward(self, features: Tensor) -> Tensor:
        """Upsample (N, C, H, W) to (N, C, scale*H, scale*W)."""
        n, c, h, w = features.shape
        k, positions = self.kernel_size, self.scale**2
        weights = self.encode(self.compress(features)).view(n, positions, k * k, h, w).softmax(2)
        ones = weights.new_ones(n, positions, c, k, k)
        # Under autocast the softmax is float32, the features need not be.
        ones, weights = ones.to(features.dtype), weights.to(features.dtype)
        return ddf_up(features, ones, weights.reshape(n, -1, h, w), scale=self.scale, kernel_size=k)


# What makes an upsampler by factor two from a number of channels.
_UPSAMPLERS: dict[str, Callable[[int], nn.Module]] = {
    "nearest": lambda channels: Resize("nearest"),
    "bilinear": lambda channels: Resize("bilinear"),
    "deconvolution": lambda channels: Double(nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)),
    "pixel_shuffle": lambda channels: Double(PixelShuffle(channels)),
    "carafe": lambda channels: Double(Carafe(channels)),
    # No activation follows the sum, hence the gain of a linear layer.
    "ddf_up": lambda channels: Double(DDFUp(channels, nonlinearity="linear")),
}
UPSAMPLERS = tuple(_UPSAMPLERS)


class LastLevelMaxPool(nn.Module):
    """The usual extra level: every other pixel of the coarsest one, named "pool"."""

    def forward(
        self, results: list[Tensor], features: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """Append the level to the results and its name to the names."""
        return [*results, F.max_pool2d(results[-1], 1, 2)], [*names, "pool"]


class FeaturePyramid(nn.Module):
    """Feature pyramid network (Lin et al., CVPR 2017) with a choice of upsampler.

    Stands in for ``torchvision.ops.FeaturePyramidNetwork``: same arguments and outputs, same keys in the
    ``state_dict`` except for the upsamplers, and with ``upsampler="nearest"`` the same values.

    Args:
        in_channels_list: Channels of every level, finest first.
        out_channels: Channels of every output.
        extra_blocks: Called with the outputs, the inputs (both lists, finest first) and the names; returns
            outputs and names, more than it got. :class:`LastLevelMaxPool` or those of torchvision.
        norm_layer: Made with ``out_channels`` and put behind every convolution, which then has no bias.
        upsampler: "nearest", "bilinear", "deconvolution", "pixel_shuffle", "carafe" or "ddf_up". All but the first
            two learn, and want every level to have twice the resolution of the next, give or take one.

    Raises:
        ArgumentError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> neck = FeaturePyramid([8, 16], 4, upsampler="ddf_up")
        >>> levels = OrderedDict(fine=torch.zeros(1, 8, 7, 9), coarse=torch.zeros(1, 16, 4, 5))
        >>> [(name, tuple(level.shape)) for name, level in neck(levels).items()]
        [('fine', (1, 4, 7, 9)), ('coarse', (1, 4, 4, 5))]
    """

    def __init__(
        self,
        in_channels_list: Sequence[int],
        out_channels: int,
        extra_blocks: nn.Module | None = None,
        norm_layer: Callable[[int], nn.Module] | None = None,
        *,
        upsampler: str = "ddf_up",
    ) -> None:
        super().__init__()
        if not in_channels_list or min(in_channels_list) < 1:
            raise ArgumentError(f"in_channels_list must hold positive numbers; got {list(in_channels_list)}")
        if out_channels < 1:
            raise ArgumentError(f"out_channels must be at least 1; got {out_channels}")
        if upsampler not in _UPSAMPLERS:
            raise ArgumentError(f"upsampler must be one of {', '.join(UPSAMPLERS)}; got {upsampler!r}")
        self.inner_blocks = nn.ModuleList(_conv(c, out_channels, 1, norm_layer) for c in in_channels_list)
        self.layer_blocks = nn.ModuleList(_conv(out_channels, out_channels, 3, norm_layer) for _ in in_channels_list)
        self.upsamplers = nn.ModuleList(_UPSAMPLERS[upsampler](out_channels) for _ in in_channels_list[1:])
        self.extra_blocks = extra_blocks

    def forward(self, features: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
        """Merge the levels, coarsest to finest.

        Args:
            features: (N, C_i, H_i, W_i) by name, finest first.

        Returns:
            (N, out_channels, H_i, W_i) by the same names, then what ``extra_blocks`` adds.

        Raises:
            ArgumentError: If the number of levels or a size does not fit.
        """
        names, inputs = list(features), list(features.values())
        if len(inputs) != len(self.inner_blocks):
            raise ArgumentError(f"features must have {len(self.inner_blocks)} levels; got {len(inputs)}")
        merged: Tensor = self.inner_blocks[-1](inputs[-1])
        results: list[Tensor] = [self.layer_blocks[-1](merged)]
        for level in reversed(range(len(inputs) - 1)):
            lateral = self.inner_blocks[level](inputs[level])
            merged = lateral + self.upsamplers[level](merged, lateral.shape[-2:])
            results.insert(0, self.layer_blocks[level](merged))
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, inputs, names)
        return OrderedDict(zip(names, results, strict=True))


def _conv(
    in_channels: int, out_channels: int, kernel_size: int, norm_layer: Callable[[int], nn.Module] | None
) -> nn.Sequential:
    """A convolution, initialised as torchvision does, and a normalisation."""
    if norm_layer is None:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        layers: list[nn.Module] = [conv]
    else:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        layers = [conv, norm_layer(out_channels)]
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(*layers)
