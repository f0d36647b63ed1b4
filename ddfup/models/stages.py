"""The steps of the default network from one level to the next finer: filters from the guide, and DDF-Up with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddfup.models.blocks import ChannelNorm, activation, add, add_pointwise, conv
from ddfup.models.layers import SpatialFilterBranch
from ddfup.models.sampling import full_precision
from ddfup.ops import ddf_up
from ddfup.tiling import Mosaic, Tile

# Unit of the corrections in deviations of the depth: about the error that is left. In units of one deviation, a
# single step of the optimiser throws the output further than it is off, and the head learns only to keep silent.
RESIDUAL_UNIT = 0.05
# A stage of more pixels than this goes by strips of about as many, or what its layers need would be several times what
# must be held.
_STRIP_PIXELS = 1 << 17


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


class Stage(nn.Module):
    """Join features with the finer guide, predict filters, and upsample the depth with them by DDF-Up.

    Args:
        cin: Width of the depth features.
        guide_channels: Width of the finer guide.
        kernel_size: K.
        refine: What refines the joined features before the filters.
    """

    def __init__(self, cin: int, guide_channels: int, kernel_size: int, refine: nn.Module) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.norm = ChannelNorm(cin)
        # The finer guide packed 2 x 2 and both joined by a 1 x 1 convolution, without the copies of doing so.
        self.join_features = conv(cin, cin, 1, gain=0.7)
        self.join_guide = conv(guide_channels, cin, 2, stride=2, padding=0, gain=0.7)
        self.refine = refine
        # What is wrong at this scale is corrected at this scale: from the finest grid alone, a whole coarse pixel is
        # out of reach.
        self.correct = conv(cin, 1, 1, gain=0)
        self.spatial = SpatialFilterBranch(cin, kernel_size, filters=4, normalization="softmax")
        with torch.no_grad():
            self.spatial.project.weight.mul_(0.1)
            self.spatial.project.bias.copy_(_bilinear_logits(kernel_size))  # type: ignore[union-attr]

    def _filters(self, features: Tensor, guide: Tensor) -> tuple[Tensor, Tensor]:
        """Refined features, (N, cin, H, W), and spatial filters, (N, 4*K*K, H, W)."""
        x = self.refine(activation(add(self.join_features(self.norm(features)), self.join_guide(guide))))
        return x, self.spatial(x)

    def _raise(self, depth: Tensor, x: Tensor, spatial: Tensor) -> Tensor:
        """Correct depth, (N, 1, H, W), and upsample it by 2."""
        k = self.kernel_size
        with full_precision(depth):
            ones = depth.new_ones(depth.shape[0], 4, 1, k, k)
            depth = depth + RESIDUAL_UNIT * self.correct(x.to(depth.dtype))
            return ddf_up(depth, ones, spatial.to(depth.dtype), scale=2, kernel_size=k, padding="replicate")

    def forward(self, features: Tensor, depth: Tensor, guide: Tensor) -> tuple[Tensor, Tensor]:
        """Upsample depth by 2, refine features where they are.

        Args:
            features: (N, cin, H, W).
            depth: (N, 1, H, W), float32 also under autocast, which would round it away.
            guide: (N, guide_channels, 2H, 2W).

        Returns:
            Features (N, cin, H, W) and depth (N, 1, 2H, 2W).
        """
        x, spatial = self._filters(features, guide)
        return x, self._raise(depth, x, spatial)


class UpStage(Stage):
    """From one level to the next finer: upsample features, too.

    Args:
        cin: Width of the depth features coming in.
        cout: Width going out.
        guide_channels: Width of the finer guide.
        context_channels: Width of the context vector.
        kernel_size: K.
        refine: What refines the joined features before the filters.
    """

    def __init__(
        self, cin: int, cout: int, guide_channels: int, context_channels: int, kernel_size: int, refine: nn.Module
    ) -> None:
        super().__init__(cin, guide_channels, kernel_size, refine)
        self.cout = cout
        self.channel = nn.Linear(context_channels, 4 * cout * kernel_size * kernel_size)
        nn.init.zeros_(self.channel.weight)
        nn.init.zeros_(self.channel.bias)
        self.reduce = conv(cin, cout, 1)
        self.guide = conv(guide_channels, cout, 1, gain=0.5)

    def forward(  # type: ignore[override]
        self, features: Tensor, depth: Tensor, guide: Tensor, context: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Upsample features and depth by 2.

        Args:
            features: (N, cin, H, W).
            depth: (N, 1, H, W), float32 also under autocast, which would round it away.
            guide: (N, guide_channels, 2H, 2W).
            context: (N, context_channels).

        Returns:
            Features (N, cout, 2H, 2W) and depth (N, 1, 2H, 2W).
        """
        x, spatial = self._filters(features, guide)
        k = self.kernel_size
        channel_filter = 1 + self.channel(context).view(-1, 4, self.cout, k, k)
        up = ddf_up(self.reduce(x), channel_filter, spatial, scale=2, kernel_size=k, padding="replicate")
        return activation(add_pointwise(up, guide, self.guide)), self._raise(depth, x, spatial)


def run_stage(
    stage: nn.Module, reach: int, x: Tensor, depth: Tensor, guide: Tensor, context: Tensor
) -> tuple[Tensor, Tensor]:
    """Run an :class:`UpStage`, by strips where the image is large.

    Args:
        stage: Which.
        reach: How far it looks, in pixels of ``x``.
        x: (N, cin, H, W) features.
        depth: (N, 1, H, W).
        guide: (N, guide_channels, 2H, 2W).
        context: (N, context_channels).

    Returns:
        Features (N, cout, 2H, 2W) and depth (N, 1, 2H, 2W), up to rounding those of the stage itself.
    """
    rows, columns = x.shape[-2:]
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or rows * columns <= _STRIP_PIXELS:
        features, raised = stage(x, depth, guide, context)
        return features, raised
    step = max(1, _STRIP_PIXELS // columns)
    wholes = [Mosaic(2 * rows, 2 * columns, memory_format=torch.channels_last) for _ in range(2)]
    for top in range(0, rows, step):
        bottom = min(rows, top + step)
        first, last = max(0, top - reach), min(rows, bottom + reach)
        parts = stage(x[..., first:last, :], depth[..., first:last, :], guide[..., 2 * first : 2 * last, :], context)
        tile = Tile((2 * first, 2 * last, 0, 2 * columns), (2 * top, 2 * bottom, 0, 2 * columns))
        for whole, part in zip(wholes, parts, strict=True):
            whole.put(tile, part)
    features, raised = (whole.image for whole in wholes)
    return features, raised
