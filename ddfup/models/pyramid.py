"""The default network: a guide pyramid and a trunk at the depth's scale, one DDF-Up per factor of two.

Each DDF-Up upsamples the features and, with the same spatial filters, the depth itself: a convex combination
of neighbours, sharp at edges. What that has beyond plain bilinear upsampling is added, through a gate, to the
cubic interpolation, which is exact on smooth surfaces, and a residual corrects the rest.

All of this happens on depth normalised within a window around every pixel, so that an edge looks the same in a small
picture and in a part of a large one, on a far wall and on a near cup.

Level l is the grid of H / 2^l. The ratio chooses the level where the trunk runs; every level keeps its weights
whatever the ratio, so one set serves all of them. What depends on the whole image (normalisation, channel
filters), and the coarse levels, whose few pixels see far, are computed once, in :meth:`GuidedPyramid.prepare`; the
rest is local, so that tiles give the same result as the whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddfup.errors import ArgumentError
from ddfup.models.blocks import ChannelNorm, ResidualBlock, activation, add, conv
from ddfup.models.consistency import Consistency
from ddfup.models.context import ContextEncoder
from ddfup.models.parts import Coarse, Prepared, Window
from ddfup.models.sampling import (
    fill_holes,
    image_statistics,
    normalize_depth,
    normalize_locally,
    sample_window,
)
from ddfup.models.stages import RESIDUAL_UNIT, Stage, UpStage, run_stage
from ddfup.tiling import Mosaic, Tile

# A level so coarse that a pixel of it covers more than any image has.
_COARSEST = 16
# A trunk at this level or a coarser one, a 64th of the pixels and less, runs for the whole image at once, never in
# tiles, which would need halos of hundreds of pixels.
_WHOLE_LEVEL = 3
# As far as this level the stages after such a trunk run for the whole image, too: what they compute is held, 12 bytes
# a pixel of the guide, and the tiles that do the rest need a third of the halo.
_TILE_LEVEL = 2


@dataclasses.dataclass(frozen=True)
class PyramidConfig:
    """Sizes of a :class:`GuidedPyramid`; written into the weight files.

    Attributes:
        feature_channels: Width of the depth features at levels 0, 1, ...; the last serves all coarser levels, and
            must equal the one before.
        guide_channels: Width of the guide features at levels 1, 2, ...; the last serves all coarser levels, and
            must equal the one before.
        trunk_channels: Width of the trunk.
        trunk_blocks: Residual blocks of the trunk at level ``full_trunk_level`` and at all coarser ones; at each
            finer one, which has four times the pixels, the first half of those before run.
        full_trunk_level: The finest level at which the whole trunk runs, from 1 to 16.
        stage_blocks: Residual blocks of the stages that end at levels 0, 1, ...; the last serves all coarser ones.
        guide_blocks: Residual blocks of the guide's encoder at levels 1, 2, ...; the last serves all coarser ones.
        context_channels: Width of the vector that describes the whole depth map.
        kernel_size: K of every DDF-Up.
        packed_head: Whether the results are predicted at level 1, four pixels at once, and no features run at
            level 0, where most of the time would go.
    """

    feature_channels: tuple[int, ...] = (16, 24, 48, 64, 64)
    guide_channels: tuple[int, ...] = (24, 32, 48, 48)
    trunk_channels: int = 64
    trunk_blocks: int = 8
    full_trunk_level: int = 3
    stage_blocks: tuple[int, ...] = (1, 1, 2, 2)
    guide_blocks: tuple[int, ...] = (1, 1, 2, 2)
    context_channels: int = 16
    kernel_size: int = 3
    packed_head: bool = False


def _pad(image: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of (N, C, H, W) until the sides are multiples."""
    right, bottom = -image.shape[-1] % multiple, -image.shape[-2] % multiple
    # Padding by nothing copies all the same. Whether it is nothing must not be asked of sizes that are symbols.
    if not torch.compiler.is_compiling() and right == bottom == 0:
        return image
    return F.pad(image, (0, right, 0, bottom), mode="replicate")


def _residual_blocks(channels: int, counts: tuple[int, ...], index: int) -> nn.Sequential:
    """As many residual blocks as a table says, whose last entry serves all further indices."""
    return nn.Sequential(*(ResidualBlock(channels) for _ in range(counts[min(index, len(counts) - 1)])))


class GuidedPyramid(nn.Module):
    """Guided depth upsampling at any ratio of at least 1 with one set of weights.

    Args:
        config: Sizes.

    Raises:
        ArgumentError: If the widths of the coarsest two levels differ, or ``full_trunk_level`` is out of range.
    """

    Config = PyramidConfig

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__()
        self.config = config
        features, guides = config.feature_channels, config.guide_channels
        for name, widths in (("feature_channels", features), ("guide_channels", guides)):
            if len(widths) < 2 or widths[-1] != widths[-2]:
                raise ArgumentError(f"{name} must end with two equal widths; got {widths}")
        if not 1 <= config.full_trunk_level <= _COARSEST:
            raise ArgumentError(f"full_trunk_level must be from 1 to {_COARSEST}; got {config.full_trunk_level}")
        # Level 1 sees the guide packed 2 x 2, so that no wide layer of the encoder runs at full resolution.
        widths = (12, *guides)
        self.guide_down = nn.ModuleList(
            conv(widths[i], widths[i + 1], stride=1 if i == 0 else 2) for i in range(len(guides))
        )
        # Coarser levels than the table has reuse the last step, which must keep its width.
        self.guide_refine = nn.ModuleList(_residual_blocks(c, config.guide_blocks, i) for i, c in enumerate(guides))
        self.guide_norm = nn.ModuleList(ChannelNorm(c) for c in guides)
        self.context = ContextEncoder(config.context_channels)
        self.stem = conv(8 + 4, config.trunk_channels)
        self.trunk_context = nn.Linear(config.context_channels, config.trunk_channels)
        self.trunk_guide = nn.ModuleList(conv(c, config.trunk_channels, 1) for c in guides)
        self.trunk = nn.ModuleList(ResidualBlock(config.trunk_channels) for _ in range(config.trunk_blocks))
        self.trunk_norm = ChannelNorm(config.trunk_channels)
        self.trunk_out = nn.ModuleList(conv(config.trunk_channels, c, 1) for c in features[1:])
        self.stages = nn.ModuleList(self._stage(i) for i in range(len(features) - 1))
        self.consistency = Consistency(config.context_channels)
        if not config.packed_head:
            self.head_norm = ChannelNorm(features[0])
            self.head_features = conv(features[0], features[0])
            self.head_inputs = conv(4, features[0])
        # Residual, gate and logarithm of the variance. The untrained network is nearly the cubic interpolation.
        self.result = conv(features[1], 4 * 3, gain=0.1) if config.packed_head else conv(features[0], 3, gain=0.1)

    def _stage(self, level: int) -> Stage:
        """The stage that ends at a level."""
        config, cin = self.config, self.config.feature_channels[level + 1]
        guide_channels = (3, *config.guide_channels)[level]
        refine = _residual_blocks(cin, config.stage_blocks, level)
        if level == 0 and config.packed_head:
            return Stage(cin, guide_channels, config.kernel_size, refine)
        cout = config.feature_channels[level]
        return UpStage(cin, cout, guide_channels, config.context_channels, config.kernel_size, refine)

    @staticmethod
    def level(ratio: float) -> int:
        """The level of the trunk: about the depth's own grid, one coarser at most, never finer than H / 2."""
        return max(1, math.floor(math.log2(ratio) + 0.1))

    def tile_grid(self, ratio: float) -> tuple[int, int]:
        """Multiple that tile offsets keep, and the halo after which a tile's estimate equals the whole's, in pixels."""
        level = self.level(ratio)
        top = self._tile_level(level)
        cell = 2**top
        blocks = self.config.guide_blocks
        # How far from a pixel the stages look, beginning with the head's two convolutions, and the guide's encoder.
        stages, encoder, halo = 2, 0, 0
        for i in range(top):
            stages += self._stage_reach(i) * 2 ** (i + 1)
            halo = max(halo, stages + encoder)
            # A strided step (of the packed guide at first), and two convolutions a block.
            encoder += max(2, 2**i) + 2 * blocks[min(i, len(blocks) - 1)] * 2 ** (i + 1)
        # What encodes the guide for the levels that are computed beforehand.
        halo = max(halo, encoder)
        if level < _WHOLE_LEVEL:
            # Stem, trunk (two convolutions a block) and the interpolation beside it.
            halo = max(halo, stages + (1 + 2 * self._trunk_depth(level) + 1) * cell + encoder)
        # Tiles begin at whole cells; their pixels lie at different places within them.
        halo += cell
        return cell, -(-halo // cell) * cell

    @staticmethod
    def _tile_level(level: int) -> int:
        """The level where tiles begin, given that of the trunk: its own where it runs in tiles as well."""
        return level if level < _WHOLE_LEVEL else _TILE_LEVEL

    def _stage_reach(self, level: int) -> int:
        """How far the stage that ends at a level looks, in pixels of the one before."""
        blocks = self.config.stage_blocks
        # Two convolutions a block, and the window of DDF-Up.
        return 2 * blocks[min(level, len(blocks) - 1)] + self.config.kernel_size // 2

    def _trunk_depth(self, level: int) -> int:
        halvings = max(0, self.config.full_trunk_level - level)
        return math.ceil(len(self.trunk) / (1 << halvings))

    def prepare(
        self,
        depth: Tensor,
        valid: Tensor,
        *,
        size: tuple[int, int],
        guide_mean: Tensor,
        guide_std: Tensor,
        parts: Iterable[tuple[Tile, Tensor]],
    ) -> Prepared:
        """Compute what depends on the whole image.

        Args:
            depth: (N, 1, h, w), any unit, values outside ``valid`` ignored.
            valid: (N, 1, h, w) bool.
            size: (H, W) of the guide, at least (h, w).
            guide_mean: (N, 1, 1, 1) mean of the guide over pixels and colours, in [0, 1].
            guide_std: (N, 1, 1, 1) deviation of the guide.
            parts: Tiles of :meth:`tile_grid` that cover the guide, each with what it reads, (N, 3, H', W'). Gone
                through once, and only where the ratio is so large that there are levels to compute beforehand.

        Raises:
            ArgumentError: If there are no parts.
        """
        prepared = self._describe(depth, valid, size, guide_mean, guide_std)
        if prepared.level < _WHOLE_LEVEL:
            return prepared
        multiple = 2**_TILE_LEVEL
        # Features of the finer levels are kept for the second pass over the tiles: computed again, they would cost a
        # tenth of the time.
        mosaics = {
            level: Mosaic(*size, cell=2**level, multiple=multiple, memory_format=torch.channels_last)
            for level in range(1, _TILE_LEVEL + 1)
        }
        for tile, part in parts:
            encoded = self._encode(prepared, part)
            for level, mosaic in mosaics.items():
                mosaic.put(tile, encoded[level])
        *finer, last = (mosaic.image for mosaic in mosaics.values())
        return dataclasses.replace(prepared, coarse=self._coarse(prepared, last, 0, 0), finer=tuple(finer))

    def region(self, prepared: Prepared, guide: Tensor, top: int = 0, left: int = 0) -> Tensor:
        """Upsample the part of the image that ``guide`` covers.

        Args:
            prepared: From :meth:`prepare`.
            guide: (N, 3, H', W'), the part of the guide that begins at (top, left).
            top: Offset in pixels, a multiple of ``tile_grid``'s first value.
            left: Likewise.

        Returns:
            (N, 2, H', W'), the estimate that :meth:`finish` makes a result of.
        """
        part = Window(top, left, guide.shape[-2], guide.shape[-1])
        if prepared.coarse is None:
            pyramid = self._encode(prepared, guide)
            coarse = self._coarse(prepared, pyramid.pop(), top, left)
        else:
            multiple = 2**_TILE_LEVEL
            coarse = prepared.coarse.crop(part.index(multiple, multiple))
            finer = [kept[part.index(2**level, multiple)] for level, kept in enumerate(prepared.finer, 1)]
            pyramid = [self._normalize(prepared, guide), *finer]
        return self._upsample(prepared, coarse, pyramid, part)

    def finish(self, prepared: Prepared, estimate: Tensor) -> Tensor:
        """Make the result of the estimates of all parts.

        Args:
            prepared: From :meth:`prepare`.
            estimate: (N, 2, H, W), put together from what :meth:`region` gave.

        Returns:
            (N, 1, H, W) in the unit of the depth.
        """
        result: Tensor = self.consistency(prepared, estimate)
        return result

    def _describe(
        self, depth: Tensor, valid: Tensor, size: tuple[int, int], guide_mean: Tensor, guide_std: Tensor
    ) -> Prepared:
        """What is known without the guide's pixels; arguments as of :meth:`prepare`."""
        normalized, mean, std = normalize_depth(depth, valid)
        filled = fill_holes(normalized, valid)
        local, deviation = normalize_locally(filled)
        ratio = size[0] / depth.shape[-2], size[1] / depth.shape[-1]
        middle = math.sqrt(ratio[0] * ratio[1])
        context = self.context(local, valid, middle)
        level = self.level(middle)
        return Prepared(filled, local, deviation, valid, mean, std, guide_mean, guide_std, context, ratio, level)

    def _normalize(self, prepared: Prepared, guide: Tensor) -> Tensor:
        """The guide, (N, 3, H', W'), as the networks read it, padded to whole cells of the tiles."""
        guide = (guide - prepared.guide_mean) / (prepared.guide_std + 0.05)
        return _pad(guide, 2 ** self._tile_level(prepared.level))

    def _encode(self, prepared: Prepared, guide: Tensor) -> list[Tensor]:
        """The normalised guide, of (N, 3, H', W'), and its features at levels 1, 2, ..., as far as tiles go."""
        guide = self._normalize(prepared, guide)
        last = self._tile_level(prepared.level)
        return [guide, *self._deepen(F.pixel_unshuffle(guide, 2), 0, last)]

    def _deepen(self, x: Tensor, first: int, last: int) -> list[Tensor]:
        """From the guide at level ``first`` (0: packed 2 x 2) to its features at the next levels up to ``last``."""
        features = []
        for i in range(first, last):
            j = min(i, len(self.guide_down) - 1)
            x = self.guide_norm[j](self.guide_refine[j](activation(self.guide_down[j](x))))
            features.append(x)
        return features

    def _coarse(self, prepared: Prepared, guide: Tensor, top: int, left: int) -> Coarse:
        """Run the trunk, and the stages that no tile computes.

        Args:
            prepared: Of the image.
            guide: (N, C, H', W') the last of what :meth:`_encode` gives for the part of the image that begins at
                (top, left) pixels.
            top: Offset in pixels.
            left: Likewise.
        """
        level, bottom = prepared.level, self._tile_level(prepared.level)
        cell = 2**level
        pyramid = [_pad(guide, 2 ** (level - bottom))]
        pyramid += self._deepen(pyramid[0], bottom, level)
        window = Window(top, left, pyramid[-1].shape[-2] * cell, pyramid[-1].shape[-1] * cell)
        holes = 1 - prepared.sample(prepared.valid.to(prepared.local.dtype), window, cell / 2, "linear")
        fine = torch.cat((prepared.sample(prepared.local, window, cell / 2), holes), dim=1)
        base = depth = prepared.sample(prepared.local, window, cell)

        x = self.stem(torch.cat((F.pixel_unshuffle(fine, 2), prepared.phase(window, cell)), dim=1))
        x = add(x, self.trunk_guide[min(level, len(self.trunk_guide)) - 1](pyramid[-1]))
        x = activation(x + self.trunk_context(prepared.context)[:, :, None, None])
        for block in self.trunk[: self._trunk_depth(level)]:
            x = block(x)
        x = activation(self.trunk_out[min(level, len(self.trunk_out)) - 1](self.trunk_norm(x)))
        for i in range(level - 1, bottom - 1, -1):
            stage = self.stages[min(i, len(self.stages) - 1)]
            x, depth = run_stage(stage, self._stage_reach(i), x, depth, pyramid[i - bottom], prepared.context)
        height, width = guide.shape[-2:]
        return Coarse(x, depth, base, (top, left)).crop((..., slice(height), slice(width)))

    def _upsample(self, prepared: Prepared, coarse: Coarse, pyramid: list[Tensor], part: Window) -> Tensor:
        """Run the stages of the fine levels and the head.

        Args:
            prepared: Of the image.
            coarse: Of the part of it.
            pyramid: Of that part, what :meth:`_encode` gives for the levels finer than that of ``coarse``; used up.
            part: What is wanted, (H', W') pixels; the pyramid may go on below and to the right.

        Returns:
            (N, 2, H', W'): the normalised depth as the guide has it, and the logarithm of its variance.
        """
        top, left = part.top, part.left
        x, depth = coarse.features, coarse.depth
        for i in range(len(pyramid) - 1, 0, -1):
            x, depth = self.stages[min(i, len(self.stages) - 1)](x, depth, pyramid.pop(), prepared.context)
        guide = pyramid.pop()
        window = Window(top, left, guide.shape[-2], guide.shape[-1])
        if self.config.packed_head:
            x, depth = self.stages[0](x, depth, guide)
            sharpened = self._beyond_bilinear(prepared, coarse, depth, window)
            outputs = F.pixel_shuffle(self.result(x), 2)
        else:
            x, depth = self.stages[0](x, depth, guide, prepared.context)
            sharpened = self._beyond_bilinear(prepared, coarse, depth, window)
            # A name for all, so that no layer of full resolution outlives its use.
            x = self.head_norm(x)
            x = self.head_features(x)
            x = add(x, self.head_inputs(torch.cat((guide, sharpened), dim=1)))
            outputs = self.result(activation(x))
        own = (..., slice(part.height), slice(part.width))
        residual, gate, log_variance = outputs[own].to(depth.dtype).chunk(3, dim=1)
        change = (2 + gate).sigmoid() * sharpened[own] + RESIDUAL_UNIT * residual
        deviation = prepared.sample(prepared.deviation, part, 1, "linear")
        estimate = prepared.sample(prepared.depth, part, 1) + deviation * change
        return torch.cat((estimate, log_variance), dim=1)

    @staticmethod
    def _beyond_bilinear(prepared: Prepared, coarse: Coarse, depth: Tensor, window: Window) -> Tensor:
        """What the stages made of the depth beyond bilinear upsampling, (N, 1, H', W')."""
        cell = 2**prepared.level
        origin = (window.top - coarse.origin[0], window.left - coarse.origin[1])
        size = (window.height, window.width)
        return depth - sample_window(coarse.base, origin, size, (cell, cell), mode="linear")

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
        guide_mean, guide_std = image_statistics(guide)
        size = (guide.shape[-2], guide.shape[-1])
        prepared = self._describe(depth, valid, size, guide_mean, guide_std)
        pyramid = self._encode(prepared, guide)
        coarse = self._coarse(prepared, pyramid.pop(), 0, 0)
        estimate = self._upsample(prepared, coarse, pyramid, Window(0, 0, *size))
        return self.finish(prepared, estimate)
