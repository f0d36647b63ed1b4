"""The default network: a guide pyramid and a trunk at the depth's scale, one DDF-Up per factor of two.

Each DDF-Up upsamples the features and, with the same spatial filters, the depth itself: a convex combination
of neighbours, sharp at edges. What that has beyond plain bilinear upsampling is added, through a gate, to the
cubic interpolation, which is exact on smooth surfaces, and a residual corrects the rest.

All of this happens on depth normalised within a window around every pixel, so that an edge looks the same in a small
picture and in a part of a large one, on a far wall and on a near cup.

Level l is the grid of H / 2^l. The ratio chooses the level where the trunk runs; every level keeps its weights
whatever the ratio, so one set serves all of them. What depends on the whole image (normalisation, channel
filters) is computed once in
:meth:`GuidedPyramid.prepare`; the rest is local, so that tiles give the same result as the whole.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddfup.errors import ArgumentError
from ddfup.models.blocks import ChannelNorm, ResidualBlock, activation, conv
from ddfup.models.context import ContextEncoder
from ddfup.models.layers import SpatialFilterBranch
from ddfup.models.sampling import fill_holes, normalize_depth, normalize_locally, positions, sample_rows_columns
from ddfup.ops import ddf_up

# Unit of the residual in deviations of the depth: about the error that is left. In units of one deviation, a
# single step of the optimiser throws the output further than it is off, and the head learns only to keep silent.
_RESIDUAL_UNIT = 0.05


@dataclasses.dataclass(frozen=True)
class PyramidConfig:
    """Sizes of a :class:`GuidedPyramid`; written into the weight files.

    Attributes:
        feature_channels: Width of the depth features at levels 0, 1, ...; the last serves all coarser levels, and
            must equal the one before.
        guide_channels: Width of the guide features at levels 1, 2, ...; the last serves all coarser levels, and
            must equal the one before.
        trunk_channels: Width of the trunk.
        trunk_blocks: Residual blocks of the trunk; at level 1, where pixels are many, the first half of them.
        context_channels: Width of the vector that describes the whole depth map.
        kernel_size: K of every DDF-Up.
    """

    feature_channels: tuple[int, ...] = (16, 24, 48, 64, 64)
    guide_channels: tuple[int, ...] = (24, 32, 48, 48)
    trunk_channels: int = 64
    trunk_blocks: int = 4
    context_channels: int = 16
    kernel_size: int = 3


def _bilinear_logits(kernel_size: int) -> Tensor:
    """Logits, (4*K*K,), whose softmax is nearly bilinear upsampling by 2: where learning begins."""
    centre = kernel_size // 2
    weights = torch.full((2, 2, kernel_size, kernel_size), 0.004)
    for i in range(2):
        for j in range(2):
            # A fine pixel lies a quarter of a cell off the centre of its coarse one, towards (2i - 1, 2j - 1).
            y, x = centre + 2 * i - 1, centre + 2 * j - 1
            weights[i, j, centre, centre] = 9 / 16
            weights[i, j, y, centre] = weights[i, j, centre, x] = 3 / 16
            weights[i, j, y, x] = 1 / 16
    return weights.log().flatten()


class UpStage(nn.Module):
    """From one level to the next finer: join with the finer guide, predict filters, DDF-Up by 2.

    Args:
        cin: Width of the depth features coming in.
        cout: Width going out.
        guide_channels: Width of the finer guide.
        context_channels: Width of the context vector.
        kernel_size: K.
    """

    def __init__(self, cin: int, cout: int, guide_channels: int, context_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.cout, self.kernel_size = cout, kernel_size
        self.norm = ChannelNorm(cin)
        # The finer guide packed 2 x 2 and both joined by a 1 x 1 convolution, without the copies of doing so.
        self.join_features = conv(cin, cin, 1, gain=0.7)
        self.join_guide = conv(guide_channels, cin, 2, stride=2, padding=0, gain=0.7)
        self.refine = ResidualBlock(cin)
        self.spatial = SpatialFilterBranch(cin, kernel_size, filters=4, normalization="softmax")
        with torch.no_grad():
            self.spatial.project.weight.mul_(0.1)
            self.spatial.project.bias.copy_(_bilinear_logits(kernel_size))  # type: ignore[union-attr]
        self.channel = nn.Linear(context_channels, 4 * cout * kernel_size * kernel_size)
        nn.init.zeros_(self.channel.weight)
        nn.init.zeros_(self.channel.bias)
        self.reduce = conv(cin, cout, 1)
        self.guide = conv(guide_channels, cout, 1, gain=0.5)

    def forward(self, features: Tensor, depth: Tensor, guide: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Upsample features and depth by 2.

        Args:
            features: (N, cin, H, W).
            depth: (N, 1, H, W), float32 also under autocast, which would round it away.
            guide: (N, guide_channels, 2H, 2W).
            context: (N, context_channels).

        Returns:
            Features (N, cout, 2H, 2W) and depth (N, 1, 2H, 2W).
        """
        x = self.refine(activation(self.join_features(self.norm(features)) + self.join_guide(guide)))
        k = self.kernel_size
        channel_filter = 1 + self.channel(context).view(-1, 4, self.cout, k, k)
        spatial = self.spatial(x)
        up = ddf_up(self.reduce(x), channel_filter, spatial, scale=2, kernel_size=k, padding="replicate")
        with torch.autocast(depth.device.type, enabled=False):
            ones = depth.new_ones(depth.shape[0], 4, 1, k, k)
            depth = ddf_up(depth, ones, spatial.to(depth.dtype), scale=2, kernel_size=k, padding="replicate")
        return activation(up + self.guide(guide)), depth


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
        size: H, W of the guide.
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
    size: tuple[int, int]


class GuidedPyramid(nn.Module):
    """Guided depth upsampling at any ratio of at least 1 with one set of weights.

    Args:
        config: Sizes.

    Raises:
        ArgumentError: If the widths of the coarsest two levels differ.
    """

    Config = PyramidConfig

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__()
        self.config = config
        features, guides = config.feature_channels, config.guide_channels
        for name, widths in (("feature_channels", features), ("guide_channels", guides)):
            if len(widths) < 2 or widths[-1] != widths[-2]:
                raise ArgumentError(f"{name} must end with two equal widths; got {widths}")
        # Level 1 sees the guide packed 2 x 2, so that no wide layer of the encoder runs at full resolution.
        widths = (12, *guides)
        self.guide_down = nn.ModuleList(
            conv(widths[i], widths[i + 1], stride=1 if i == 0 else 2) for i in range(len(guides))
        )
        # Coarser levels than the table has reuse the last step, which must keep its width.
        self.guide_refine = nn.ModuleList(ResidualBlock(c) for c in guides)
        self.guide_norm = nn.ModuleList(ChannelNorm(c) for c in guides)
        self.context = ContextEncoder(config.context_channels)
        self.stem = conv(8, config.trunk_channels)
        self.trunk_context = nn.Linear(config.context_channels, config.trunk_channels)
        self.trunk_guide = nn.ModuleList(conv(c, config.trunk_channels, 1) for c in guides)
        self.trunk = nn.ModuleList(ResidualBlock(config.trunk_channels) for _ in range(config.trunk_blocks))
        self.trunk_norm = ChannelNorm(config.trunk_channels)
        self.trunk_out = nn.ModuleList(conv(config.trunk_channels, c, 1) for c in features[1:])
        self.stages = nn.ModuleList(
            UpStage(features[i + 1], features[i], (3, *guides)[i], config.context_channels, config.kernel_size)
            for i in range(len(features) - 1)
        )
        self.head_norm = ChannelNorm(features[0])
        self.head_features = conv(features[0], features[0])
        self.head_inputs = conv(4, features[0])
        # Residual and gate. The untrained network is nearly the cubic interpolation.
        self.result = conv(features[0], 2, gain=0.1)

    @staticmethod
    def level(ratio: float) -> int:
        """The level of the trunk: about the depth's own grid, one coarser at most, never finer than H / 2."""
        return max(1, math.floor(math.log2(ratio) + 0.1))

    def tile_grid(self, ratio: float) -> tuple[int, int]:
        """Multiple that tile offsets keep, and the halo after which a tile equals the whole; both in pixels."""
        level = self.level(ratio)
        cell = 2**level
        blocks = self._trunk_depth(level)
        # Stem, trunk (two convolutions each) and the interpolation beside it; at every level at most a strided
        # step and two refining convolutions of the guide, two of the stage and the window of DDF-Up; the finest
        # level adds the head's two.
        cells_at_trunk = 1 + 2 * blocks + 1
        per_level = 3 + 2 + self.config.kernel_size // 2
        halo = cells_at_trunk * cell + sum(per_level * 2**i for i in range(1, level + 1)) + 4
        return cell, -(-halo // cell) * cell

    def _trunk_depth(self, level: int) -> int:
        return len(self.trunk) if level > 1 else (len(self.trunk) + 1) // 2

    def prepare(
        self,
        depth: Tensor,
        valid: Tensor,
        *,
        size: tuple[int, int],
        guide_mean: Tensor,
        guide_std: Tensor,
    ) -> Prepared:
        """Compute what depends on the whole image.

        Args:
            depth: (N, 1, h, w), any unit, values outside ``valid`` ignored.
            valid: (N, 1, h, w) bool.
            size: (H, W) of the guide, at least (h, w).
            guide_mean: (N, 1, 1, 1) mean of the guide over pixels and colours, in [0, 1].
            guide_std: (N, 1, 1, 1) deviation of the guide.
        """
        normalized, mean, std = normalize_depth(depth, valid)
        filled = fill_holes(normalized, valid)
        local, deviation = normalize_locally(filled)
        ratio = math.sqrt(size[0] / depth.shape[-2] * size[1] / depth.shape[-1])
        context = self.context(local, valid, ratio)
        return Prepared(filled, local, deviation, valid, mean, std, guide_mean, guide_std, context, size)

    def region(self, prepared: Prepared, guide: Tensor, top: int = 0, left: int = 0) -> Tensor:
        """Upsample the part of the image that ``guide`` covers.

        Args:
            prepared: From :meth:`prepare`.
            guide: (N, 3, H', W'), the part of the guide that begins at (top, left).
            top: Offset in pixels, a multiple of ``tile_grid``'s first value.
            left: Likewise.

        Returns:
            (N, 1, H', W') in the unit of the depth.
        """
        height, width = guide.shape[-2:]
        h, w = prepared.depth.shape[-2:]
        ratio_y, ratio_x = prepared.size[0] / h, prepared.size[1] / w
        level = self.level(math.sqrt(ratio_y * ratio_x))
        cell = 2**level
        guide = (guide - prepared.guide_mean) / (prepared.guide_std + 0.05)
        guide = F.pad(guide, (0, -width % cell, 0, -height % cell), mode="replicate")

        device = guide.device

        def sampled(image: Tensor, step: float, mode: str = "cubic") -> Tensor:
            y = positions(top, round(guide.shape[-2] / step), step, ratio_y, device)
            x = positions(left, round(guide.shape[-1] / step), step, ratio_x, device)
            return sample_rows_columns(image, y, x, mode=mode)

        holes = 1 - sampled(prepared.valid.to(guide.dtype), cell / 2, "linear")
        fine = torch.cat((sampled(prepared.local, cell / 2), holes), dim=1)
        change = self._decode(
            self.stem(F.pixel_unshuffle(fine, 2)), sampled(prepared.local, cell), guide, prepared.context, level
        )
        result = sampled(prepared.depth, 1) + sampled(prepared.deviation, 1, "linear") * change
        return result[..., :height, :width] * prepared.std + prepared.mean

    def _decode(self, features: Tensor, depth: Tensor, guide: Tensor, context: Tensor, level: int) -> Tensor:
        """From the stem's features and the depth at the trunk's level to the correction of the interpolated depth.

        Args:
            features: (N, trunk_channels, H / 2^level, W / 2^level).
            depth: (N, 1, H / 2^level, W / 2^level), locally normalised.
            guide: (N, 3, H, W) normalised.
            context: (N, context_channels).
            level: Of the trunk.

        Returns:
            (N, 1, H, W) in local deviations.
        """
        pyramid = [guide]
        x = F.pixel_unshuffle(guide, 2)
        for i in range(level):
            j = min(i, len(self.guide_down) - 1)
            x = self.guide_norm[j](self.guide_refine[j](activation(self.guide_down[j](x))))
            pyramid.append(x)
        deepest = min(level, len(self.trunk_guide)) - 1
        x = activation(
            features + self.trunk_guide[deepest](pyramid[level]) + self.trunk_context(context)[:, :, None, None]
        )
        for block in self.trunk[: self._trunk_depth(level)]:
            x = block(x)
        x = activation(self.trunk_out[min(level, len(self.trunk_out)) - 1](self.trunk_norm(x)))
        smooth = F.interpolate(depth, scale_factor=2**level, mode="bilinear", align_corners=False)
        for i in range(level - 1, -1, -1):
            x, depth = self.stages[min(i, len(self.stages) - 1)](x, depth, pyramid[i], context)
        sharpened = depth - smooth
        x = activation(self.head_features(self.head_norm(x)) + self.head_inputs(torch.cat((guide, sharpened), dim=1)))
        residual, gate = self.result(x).to(depth.dtype).chunk(2, dim=1)
        result: Tensor = (2 + gate).sigmoid() * sharpened + _RESIDUAL_UNIT * residual
        return result

    def forward(self, depth: Tensor, guide: Tensor, valid: Tensor | None = None) -> Tensor:
        """Upsample a whole image.

        Args:
            depth: (N, 1, h, w), any unit.
            guide: (N, 3, H, W) in [0, 1].
            valid: (N, 1, h, w) bool; None: all finite pixels.

        Returns:
            (N, 1, H, W) in the unit of the depth, without holes.
        """
        if valid is None:
            valid = depth.isfinite()
        guide_std, guide_mean = torch.std_mean(guide, dim=(1, 2, 3), keepdim=True, correction=0)
        size = (guide.shape[-2], guide.shape[-1])
        prepared = self.prepare(depth, valid, size=size, guide_mean=guide_mean, guide_std=guide_std)
        return self.region(prepared, guide)
