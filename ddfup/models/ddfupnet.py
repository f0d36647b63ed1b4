"""DDF-Up-Net, the upsampling network of the paper (Fig. 6b), laid out as PAC-Net (Su et al., CVPR 2019).

The paper gives the layout, not every size; those of PAC-Net are taken: three 5 x 5 convolutions of 32
channels for the depth, three for the guide of which the last gives 16 channels per stage, one DDF-Up by 2 per
factor of two, two 5 x 5 convolutions.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddfup.errors import ArgumentError
from ddfup.models.layers import DDFUp
from ddfup.models.sampling import fill_holes, normalize_depth, positions, sample_rows_columns


@dataclasses.dataclass(frozen=True)
class DDFUpNetConfig:
    """Sizes of a :class:`DDFUpNet`; written into the weight files.

    Attributes:
        scale: Factor the network is made for: 2, 4, 8 or 16.
        channels: Width of the depth features.
        guide_channels: Guide features per stage.
        kernel_size: K of every DDF-Up.
        skip: Add the result to the interpolated depth. The paper does not say; its 1500 epochs can learn the
            identity, shorter training wants it given.
    """

    scale: int = 8
    channels: int = 32
    guide_channels: int = 16
    kernel_size: int = 3
    skip: bool = False


class DDFUpNet(nn.Module):
    """The paper's network for one factor; at another ratio the depth is first resampled to its grid.

    Args:
        config: Sizes.

    Raises:
        ArgumentError: If the scale is not 2, 4, 8 or 16.
    """

    Config = DDFUpNetConfig

    def __init__(self, config: DDFUpNetConfig) -> None:
        super().__init__()
        if config.scale not in (2, 4, 8, 16):
            raise ArgumentError(f"scale must be 2, 4, 8 or 16; got {config.scale}")
        self.config = config
        stages = int(math.log2(config.scale))
        c, g = config.channels, config.guide_channels
        self.depth_encoder = nn.Sequential(
            nn.Conv2d(1, c, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(c, c, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(c, c, 5, padding=2),
            nn.ReLU(),
        )
        self.guide_encoder = nn.Sequential(
            nn.Conv2d(3, c, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(c, c, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(c, g * stages, 5, padding=2),
        )
        self.stages = nn.ModuleList(
            DDFUp(c, scale=2, kernel_size=config.kernel_size, guidance_channels=g, guidance_scale=2)
            for _ in range(stages)
        )
        self.decoder = nn.Sequential(nn.Conv2d(c, c, 5, padding=2), nn.ReLU(), nn.Conv2d(c, 1, 5, padding=2))

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
        normalized, mean, std = normalize_depth(depth, valid)
        low = fill_holes(normalized, valid)

        height, width = guide.shape[-2:]
        ratio_y, ratio_x = height / depth.shape[-2], width / depth.shape[-1]
        scale = self.config.scale
        padded = F.pad(guide - 0.5, (0, -width % scale, 0, -height % scale), mode="replicate")
        rows, columns = padded.shape[-2] // scale, padded.shape[-1] // scale
        if (rows, columns) != tuple(low.shape[-2:]):
            y = positions(0, rows, scale, ratio_y, guide.device)
            x = positions(0, columns, scale, ratio_x, guide.device)
            features = self.depth_encoder(sample_rows_columns(low, y, x))
        else:
            features = self.depth_encoder(low)

        guidance = self.guide_encoder(padded).split(self.config.guide_channels, dim=1)
        for i, stage in enumerate(self.stages):
            shrink = scale // 2 ** (i + 1)
            at_stage = guidance[i] if shrink == 1 else F.avg_pool2d(guidance[i], shrink)
            features = torch.relu(stage(features, at_stage))
        result: Tensor = self.decoder(features)[..., :height, :width]
        if self.config.skip:
            y = positions(0, height, 1, ratio_y, guide.device)
            x = positions(0, width, 1, ratio_x, guide.device)
            result = result + sample_rows_columns(low, y, x)
        return result * std + mean
