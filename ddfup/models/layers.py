"""The building blocks of "Decoupled Dynamic Filter Networks" (Zhou et al., CVPR 2021) as PyTorch modules.

``DDF`` takes the place of a K x K convolution, ``DDFUp`` that of an upsampling layer; both only predict
filters and hand them to :mod:`ddfup.ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddfup.errors import ArgumentError
from ddfup.ops import ddf, ddf_up
from ddfup.ops.convex import convex_filters

# Added to the standard deviation of a filter; the value of the authors' code.
_EPS = 1e-10


class FilterNorm(nn.Module):
    """Normalise every K x K filter to zero mean and a chosen standard deviation (eq. 3 of the paper).

    ``alpha * (filter - mean) / (std + eps)`` over the K*K values of each filter, with the unbiased standard
    deviation.

    Args:
        kernel_size: K, odd and at least 3: a single value has no deviation.
        channels: None for spatial filters, whose ``alpha`` is the constant gain / K; C for channel filters,
            which learn one ``alpha`` per filter value, started at random values of that size.
        nonlinearity: What follows the filter; chooses the gain as :func:`torch.nn.init.calculate_gain` does.

    Raises:
        ArgumentError: If ``kernel_size`` is even or less than 3.
    """

    alpha: Tensor

    def __init__(self, kernel_size: int, *, channels: int | None = None, nonlinearity: str = "relu") -> None:
        super().__init__()
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ArgumentError(
                f"kernel_size must be odd and at least 3 to be normalised; got {kernel_size}",
                "use normalization='softmax' or 'none' for 1 x 1 filters",
            )
        self.values = kernel_size * kernel_size
        gain = nn.init.calculate_gain(nonlinearity) / kernel_size  # type: ignore[arg-type]
        if channels is None:
            self.register_buffer("alpha", torch.tensor(gain), persistent=False)
        else:
            self.alpha = nn.Parameter(torch.randn(channels, self.values) * gain)

    def forward(self, filters: Tensor) -> Tensor:
        """Normalise.

        Args:
            filters: (N, ..., K*K) or, for channel filters, (N, ..., C, K*K).

        Returns:
            The same shape.
        """
        # In full precision: half of it has no number as small as what a flat filter is divided by.
        full = filters.float() if filters.dtype in (torch.float16, torch.bfloat16) else filters
        std, mean = torch.std_mean(full, dim=-1, keepdim=True, correction=1)
        return (self.alpha * (full - mean) / (std + _EPS)).to(torch.result_type(self.alpha, filters))


class SpatialFilterBranch(nn.Module):
    """Predict one K x K filter per pixel, head and output sub-position with a single 1 x 1 convolution.

    Args:
        in_channels: Channels of the guidance.
        kernel_size: K.
        filters: S, sub-positions per pixel: 1 for ``DDF``, scale * scale for ``DDFUp``.
        heads: Groups of channels with a filter of their own.
        stride: Stride of the convolution, as that of the ``DDF`` it serves.
        normalization: "filter_norm" (the paper), "softmax" (a convex combination; what an upsampler of depth
            wants) or "none".
        nonlinearity: For the gain of filter normalisation.

    Raises:
        ArgumentError: If ``normalization`` is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int,
        *,
        filters: int = 1,
        heads: int = 1,
        stride: int = 1,
        normalization: str = "filter_norm",
        nonlinearity: str = "relu",
    ) -> None:
        super().__init__()
        if normalization not in ("filter_norm", "softmax", "none"):
            raise ArgumentError(f"normalization must be 'filter_norm', 'softmax' or 'none'; got {normalization!r}")
        self.filters = filters * heads
        self.stride = stride
        self.values = kernel_size * kernel_size
        self.normalization = normalization
        self.project = nn.Conv2d(in_channels, self.filters * self.values, 1, stride=stride)
        self.norm = FilterNorm(kernel_size, nonlinearity=nonlinearity) if normalization == "filter_norm" else None

    def forward(self, guidance: Tensor) -> Tensor:
        """Predict.

        Args:
            guidance: (N, in_channels, H, W).

        Returns:
            (N, S*heads*K*K, ceil(H/stride), ceil(W/stride)).
        """
        if self.stride > 1:
            guidance = guidance[..., :: self.stride, :: self.stride]
        weight, bias = self.project.weight.flatten(1), self.project.bias
        assert bias is not None
        if self.normalization == "softmax":
            return convex_filters(guidance, weight, bias, taps=self.values)
        n, _, h, w = guidance.shape
        # The 1 x 1 convolution, as a matrix product: its planes come out as the op reads them, whatever comes in.
        planes = torch.baddbmm(bias[:, None], weight.expand(n, -1, -1), guidance.flatten(2))
        if self.norm is not None:
            stacked = planes.view(n, self.filters, self.values, h, w)
            planes = self.norm(stacked.movedim(2, -1)).movedim(-1, 2)
        return planes.reshape(n, self.filters * self.values, h, w)


class ChannelFilterBranch(nn.Module):
    """Predict one K x K filter per channel and sub-position from pooled features (squeeze and excite).

    Args:
        in_channels: C.
        kernel_size: K.
        filters: S, sub-positions per pixel.
        se_ratio: sigma of the paper, width of the hidden layer relative to C.
        nonlinearity: For the gain of filter normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int,
        *,
        filters: int = 1,
        se_ratio: float = 0.2,
        nonlinearity: str = "relu",
    ) -> None:
        super().__init__()
        hidden = max(1, int(in_channels * se_ratio))
        self.shape = (filters, in_channels, kernel_size * kernel_size)
        self.kernel_size = kernel_size
        self.squeeze = nn.Conv2d(in_channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, filters * in_channels * kernel_size * kernel_size, 1)
        self.norm = (
            FilterNorm(kernel_size, channels=filters * in_channels, nonlinearity=nonlinearity)
            if kernel_size > 1
            else None
        )

    def forward(self, features: Tensor) -> Tensor:
        """Predict.

        Args:
            features: (N, C, H, W).

        Returns:
            (N, S, C, K, K).
        """
        s, c, values = self.shape
        pooled = features.mean(dim=(2, 3), keepdim=True)
        filters: Tensor = self.excite(F.relu(self.squeeze(pooled))).reshape(-1, s * c, values)
        if self.norm is not None:
            filters = self.norm(filters)
        return filters.reshape(-1, s, c, self.kernel_size, self.kernel_size)


class DDF(nn.Module):
    """Decoupled dynamic filter with its two branches (Fig. 2b), for a K x K convolution of equal channels.

    Args:
        in_channels: C, in and out.
        kernel_size: K, odd.
        stride: Output is (ceil(H/stride), ceil(W/stride)), as of a padded convolution.
        dilation: Distance between taps.
        heads: Groups of channels with a spatial filter of their own; divides C.
        se_ratio: Width of the channel branch's hidden layer relative to C.
        combine: "mul" or "add".
        padding: "zeros" or "replicate".
        nonlinearity: What follows, for the gain of the normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        dilation: int = 1,
        heads: int = 1,
        se_ratio: float = 0.2,
        combine: str = "mul",
        padding: str = "zeros",
        nonlinearity: str = "relu",
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation, self.heads = kernel_size, stride, dilation, heads
        self.combine, self.padding = combine, padding
        self.spatial = SpatialFilterBranch(
            in_channels,
            kernel_size,
            heads=heads,
            stride=stride,
            normalization="filter_norm" if kernel_size > 1 else "none",
            nonlinearity=nonlinearity,
        )
        self.channel = ChannelFilterBranch(in_channels, kernel_size, se_ratio=se_ratio, nonlinearity=nonlinearity)

    def forward(self, features: Tensor) -> Tensor:
        """Filter (N, C, H, W) to (N, C, ceil(H/stride), ceil(W/stride))."""
        return ddf(
            features,
            self.channel(features).squeeze(1),
            self.spatial(features),
            kernel_size=self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            heads=self.heads,
            combine=self.combine,
            padding=self.padding,
        )


class DDFUp(nn.Module):
    """Upsample with decoupled dynamic filters (Fig. 5), the spatial ones predicted from guidance.

    Args:
        in_channels: C, in and out.
        scale: Integer factor of upsampling.
        kernel_size: K, odd.
        guidance_channels: Channels of the guidance; None: no guidance, the features after a depth-wise
            convolution serve.
        guidance_scale: 1: guidance lies on the features' grid. Equal to ``scale``: it lies on the output's
            grid and is packed by pixel unshuffle.
        dilation: Distance between taps.
        heads: Groups of channels with a spatial filter of their own; divides C.
        se_ratio: Width of the channel branch's hidden layer relative to C.
        combine: "mul" or "add".
        padding: "zeros" or "replicate".
        normalization: Of the spatial filters, see :class:`SpatialFilterBranch`.
        nonlinearity: What follows, for the gain of the normalisation.

    Raises:
        ArgumentError: If ``guidance_scale`` is neither 1 nor ``scale``.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        scale: int = 2,
        kernel_size: int = 3,
        guidance_channels: int | None = None,
        guidance_scale: int = 1,
        dilation: int = 1,
        heads: int = 1,
        se_ratio: float = 0.2,
        combine: str = "mul",
        padding: str = "zeros",
        normalization: str = "filter_norm",
        nonlinearity: str = "relu",
    ) -> None:
        super().__init__()
        if guidance_scale not in (1, scale):
            raise ArgumentError(f"guidance_scale must be 1 or scale = {scale}; got {guidance_scale}")
        self.scale, self.kernel_size, self.dilation, self.heads = scale, kernel_size, dilation, heads
        self.combine, self.padding = combine, padding
        self.guided = guidance_channels is not None
        self.guidance_scale = guidance_scale
        self.own_guidance = (
            None
            if self.guided
            else nn.Conv2d(in_channels, in_channels, kernel_size, padding=kernel_size // 2, groups=in_channels)
        )
        width = in_channels if guidance_channels is None else guidance_channels * guidance_scale**2
        self.spatial = SpatialFilterBranch(
            width,
            kernel_size,
            filters=scale * scale,
            heads=heads,
            normalization=normalization,
            nonlinearity=nonlinearity,
        )
        self.channel = ChannelFilterBranch(
            in_channels, kernel_size, filters=scale * scale, se_ratio=se_ratio, nonlinearity=nonlinearity
        )

    def forward(self, features: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Upsample.

        Args:
            features: (N, C, H, W).
            guidance: (N, guidance_channels, g*H, g*W) with g = ``guidance_scale``; None exactly where the
                module has no guidance.

        Returns:
            (N, C, scale*H, scale*W).

        Raises:
            ArgumentError: If guidance is missing, superfluous or of the wrong size.
        """
        if self.own_guidance is not None:
            if guidance is not None:
                raise ArgumentError("guidance was given to a DDFUp made without guidance_channels")
            guidance = self.own_guidance(features)
        elif guidance is None:
            raise ArgumentError("guidance is missing; this DDFUp was made with guidance_channels")
        else:
            h, w = features.shape[-2] * self.guidance_scale, features.shape[-1] * self.guidance_scale
            if guidance.shape[-2:] != (h, w):
                raise ArgumentError(f"guidance must be (N, C, {h}, {w}); got {tuple(guidance.shape)}")
            if self.guidance_scale > 1:
                guidance = F.pixel_unshuffle(guidance, self.guidance_scale)
        return ddf_up(
            features,
            self.channel(features),
            self.spatial(guidance),
            scale=self.scale,
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            heads=self.heads,
            combine=self.combine,
            padding=self.padding,
        )
