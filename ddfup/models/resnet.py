"""DDF-ResNet: a residual network for images whose 3 x 3 convolutions are decoupled dynamic filters.

Names of modules follow timm's ResNet, so that the checkpoints of the paper's authors load.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from ddfup.errors import ArgumentError
from ddfup.models.layers import DDF

# Kind of block and number of blocks per stage.
_DEPTHS: dict[int, tuple[str, tuple[int, int, int, int]]] = {
    18: ("basic", (2, 2, 2, 2)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
}
# Parts of a DDF in the authors' files, and here.
_PUBLISHED_PARTS = {
    "spatial_branch.0.weight": "spatial.project.weight",
    "spatial_branch.0.bias": "spatial.project.bias",
    "channel_branch.1.weight": "channel.squeeze.weight",
    "channel_branch.1.bias": "channel.squeeze.bias",
    "channel_branch.3.weight": "channel.excite.weight",
    "channel_branch.3.bias": "channel.excite.bias",
    "channel_branch.4.std": "channel.norm.alpha",
}


class BasicBlock(nn.Module):
    """Two 3 x 3 filters around a shortcut; the block of ResNet18.

    A dynamic filter keeps the number of channels and does not mix them, so a 1 x 1 convolution follows each.

    Args:
        in_channels: Channels in.
        width: Channels out.
        stride: Of the first filter.
        combine: "mul" or "add"; None: ordinary 3 x 3 convolutions.
        se_ratio: See :class:`DDFResNet`.
    """

    expansion = 1
    se_ratio = 0.5

    def __init__(self, in_channels: int, width: int, *, stride: int, combine: str | None, se_ratio: float) -> None:
        super().__init__()
        self.conv1 = _filter_and_mix(in_channels, width, stride, combine, se_ratio)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = _filter_and_mix(width, width, 1, combine, se_ratio)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Refine (N, in_channels, H, W) to (N, width, ceil(H/stride), ceil(W/stride))."""
        change = self.act1(self.bn1(self.conv1(x)))
        change = self.bn2(self.conv2(change))
        result: Tensor = self.act2(change + (x if self.downsample is None else self.downsample(x)))
        return result

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation before the sum."""
        return self.bn2


class Bottleneck(nn.Module):
    """A 3 x 3 filter between two 1 x 1 convolutions around a shortcut; the block of ResNet50 and 101.

    Args:
        in_channels: Channels in.
        width: Channels of the filter; four times as many go out.
        stride: Of the filter.
        combine: "mul" or "add"; None: an ordinary 3 x 3 convolution.
        se_ratio: See :class:`DDFResNet`.
    """

    expansion = 4
    se_ratio = 0.2

    def __init__(self, in_channels: int, width: int, *, stride: int, combine: str | None, se_ratio: float) -> None:
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = (
            nn.Conv2d(width, width, 3, stride, 1, bias=False)
            if combine is None
            else DDF(width, 3, stride=stride, combine=combine, se_ratio=se_ratio)
        )
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Refine (N, in_channels, H, W) to (N, 4 * width, ceil(H/stride), ceil(W/stride))."""
        change = self.act1(self.bn1(self.conv1(x)))
        change = self.act2(self.bn2(self.conv2(change)))
        change = self.bn3(self.conv3(change))
        result: Tensor = self.act3(change + (x if self.downsample is None else self.downsample(x)))
        return result

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation before the sum."""
        return self.bn3


_BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class DDFResNet(nn.Module):
    """A ResNet with dynamic filters for its 3 x 3 convolutions, Table 4 of the paper.

    ``load_state_dict`` also takes the keys and shapes of the authors' checkpoints, see :func:`published_to_own`.

    Args:
        blocks: Number of blocks per stage; every stage after the first halves the resolution.
        block: "bottleneck" or "basic".
        combine: "mul" or "add"; None: ordinary 3 x 3 convolutions, the network compared with.
        se_ratio: sigma of the paper, width of the hidden layer of a DDF's channel branch relative to its channels.
            None: 0.2 for bottlenecks, as in the authors' code; 0.5 for basic blocks, see ``docs/modules.md``.
        width: Channels of the first stage; doubled by every further one.
        stem: "imagenet": 7 x 7 convolution and pooling, which quarter height and width; "small": a 3 x 3
            convolution at full resolution, for images of some ten pixels.
        num_classes: Size of the output; 0: the pooled features instead.
        in_chans: Channels of the images.
        drop_rate: Share of the pooled features dropped in training.

    Raises:
        ArgumentError: If an option is unknown or out of its range.

    Example:
        >>> import torch
        >>> network = DDFResNet((1, 1), block="basic", width=8, stem="small", num_classes=10, in_chans=1)
        >>> network(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        block: str = "bottleneck",
        combine: str | None = "mul",
        se_ratio: float | None = None,
        width: int = 64,
        stem: str = "imagenet",
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check(blocks, block, combine, se_ratio, stem, {"width": width, "in_chans": in_chans}, num_classes, drop_rate)
        kind = _BLOCKS[block]
        ratio = kind.se_ratio if se_ratio is None else se_ratio
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(in_chans, width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        # What timm reads to take the network for a backbone.
        self.feature_info = [{"num_chs": width, "reduction": 2 if large else 1, "module": "act1"}]
        channels, reduction = width, 4 if large else 1
        self.stages = len(blocks)
        for stage, count in enumerate(blocks):
            layers: list[nn.Module] = []
            for position in range(count):
                stride = 2 if stage > 0 and position == 0 else 1
                layers.append(kind(channels, width << stage, stride=stride, combine=combine, se_ratio=ratio))
                channels = (width << stage) * kind.expansion
                reduction *= stride
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"layer{stage + 1}"})
        self.num_features = channels
        self.num_classes = num_classes
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        self.register_load_state_dict_pre_hook(_accept_published)  # type: ignore[no-untyped-call]
        self._initialize()

    def features(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Compute the output of every stage, finest first.

        Args:
            images: (N, in_chans, H, W).

        Returns:
            "layer1", "layer2", ...: (N, C, H/r, W/r), with C and r, rounded up, as in ``feature_info``. What
            :class:`ddfup.models.fpn.FeaturePyramid` takes.
        """
        x = self.maxpool(self.act1(self.bn1(self.conv1(images))))
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
            maps[f"layer{stage}"] = x
        return maps

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute the output of the last stage; the name is timm's."""
        return self.features(images)[f"layer{self.stages}"]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool (N, num_features, h, w) to (N, num_features), then classify unless ``pre_logits``; as in timm."""
        pooled: Tensor = self.global_pool(features).flatten(1)
        pooled = self.drop(pooled)
        return pooled if pre_logits else self._classify(pooled)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: (N, in_chans, H, W).

        Returns:
            (N, num_classes), before the softmax.
        """
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """Return the last layer; the name is timm's."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by a new one; the name is timm's.

        Args:
            num_classes: Size of the output; 0: the pooled features instead.
        """
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def _classify(self, pooled: Tensor) -> Tensor:
        scores: Tensor = self.fc(pooled)
        return scores

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock | Bottleneck):
                # Every block starts as its shortcut.
                nn.init.zeros_(module.last_norm.weight)


def ddf_resnet(
    depth: int,
    *,
    combine: str | None = "mul",
    se_ratio: float | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.0,
) -> DDFResNet:
    """Make a DDF-ResNet of the paper, untrained.

    Args:
        depth: 18, 50 or 101.
        combine: "mul" or "add"; None: the ordinary ResNet.
        se_ratio: See :class:`DDFResNet`.
        num_classes: Size of the output.
        in_chans: Channels of the images.
        drop_rate: Share of the pooled features dropped in training.

    Raises:
        ArgumentError: If an option is unknown or out of its range.

    Example:
        >>> sum(parameter.numel() for parameter in ddf_resnet(50).parameters()) / 1e6
        16.84...
    """
    if depth not in _DEPTHS:
        raise ArgumentError(f"depth must be one of {', '.join(map(str, _DEPTHS))}; got {depth}")
    block, blocks = _DEPTHS[depth]
    return DDFResNet(
        blocks,
        block=block,
        combine=combine,
        se_ratio=se_ratio,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
    )


def register_timm() -> list[str]:
    """Make the networks known to timm, as ``ddf_mul_resnet50`` and so on; harmless when done twice.

    Returns:
        The names, for ``timm.create_model``.

    Raises:
        ArgumentError: If timm cannot be imported.
    """
    try:
        from ddfup.models import timm_entries
    except ImportError as error:
        raise ArgumentError(
            f"timm cannot be imported: {error}", "install it with: pip install 'ddfup[timm]'"
        ) from error
    return list(timm_entries.NAMES)


def published_to_own(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Rename the entries of the authors' checkpoints (https://github.com/theFoxofSky/ddfnet) to those used here.

    Their classifiers are timm ResNets with a ``DDFPack`` for ``conv2`` of every bottleneck; only what is inside of
    that has other names here, and one shape differs: the deviations of the channel filters, (C*K*K) there, are
    (C, K*K) here.

    Args:
        state: The "state_dict" of their file, or one with the names used here, which stay.
        prefix: Only entries below it are renamed.

    Returns:
        The entries in their order, tensors shared.
    """
    renamed = {}
    for key, value in state.items():
        for theirs, ours in _PUBLISHED_PARTS.items():
            if key.startswith(prefix) and key.endswith(f".{theirs}"):
                key = key.removesuffix(theirs) + ours
                if theirs.endswith("std"):
                    value = value.reshape(-1, 9)
        renamed[key] = value
    return renamed


def _accept_published(_module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_rest: Any) -> None:
    """Rename before loading; ``state`` is the copy that ``load_state_dict`` works on."""
    renamed = published_to_own(state, prefix)
    if list(renamed) != list(state):
        state.clear()
        state.update(renamed)


def _filter_and_mix(
    in_channels: int, out_channels: int, stride: int, combine: str | None, se_ratio: float
) -> nn.Module:
    """A 3 x 3 convolution, or a dynamic filter and a 1 x 1 convolution."""
    if combine is None:
        return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
    return nn.Sequential(
        DDF(in_channels, 3, stride=stride, combine=combine, se_ratio=se_ratio),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
    )


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """What brings the input of a block to the shape of its output; None where it has it."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def _check(
    blocks: Sequence[int],
    block: str,
    combine: str | None,
    se_ratio: float | None,
    stem: str,
    sizes: Mapping[str, int],
    num_classes: int,
    drop_rate: float,
) -> None:
    """Raise ArgumentError unless every option is in its range."""
    if not blocks or min(blocks) < 1:
        raise ArgumentError(f"blocks must be a positive number of blocks for every stage; got {tuple(blocks)}")
    if block not in _BLOCKS:
        raise ArgumentError(f"block must be 'basic' or 'bottleneck'; got {block!r}")
    if combine not in ("mul", "add", None):
        raise ArgumentError(f"combine must be 'mul', 'add' or None; got {combine!r}")
    if se_ratio is not None and se_ratio <= 0:
        raise ArgumentError(f"se_ratio must be positive; got {se_ratio}")
    if stem not in ("imagenet", "small"):
        raise ArgumentError(f"stem must be 'imagenet' or 'small'; got {stem!r}")
    for name, value in sizes.items():
        if value < 1:
            raise ArgumentError(f"{name} must be at least 1; got {value}")
    if num_classes < 0:
        raise ArgumentError(f"num_classes must not be negative; got {num_classes}")
    if not 0 <= drop_rate < 1:
        raise ArgumentError(f"drop_rate must be at least 0 and below 1; got {drop_rate}")
