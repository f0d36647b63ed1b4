"""The op in PyTorch's standard operators, as a graph that any runtime can take; nothing is written in place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ddfup.ops import reference


def ddf(
    features: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    scale: int,
    kernel_size: int,
    stride: int,
    dilation: int,
    heads: int,
    combine: int,
    padding: int,
) -> Tensor:
    """Filter as :func:`ddfup.ops.reference.ddf`, which has the arguments, does."""
    batch, channels = features.shape[:2]
    rows, columns = spatial_filter.shape[2:]
    if dilation > 1:
        # Taps further out than the image see the same padding. Not asked where sizes may be symbols.
        dilation = min(dilation, max(features.shape[2:]))
    margin = kernel_size // 2 * dilation
    mode = "replicate" if padding == reference.REPLICATE else "constant"
    padded = F.pad(features, (margin,) * 4, mode=mode)
    down, across = (rows - 1) * stride + 1, (columns - 1) * stride + 1
    taps = [(y * dilation, x * dilation) for y in range(kernel_size) for x in range(kernel_size)]
    # (N, heads, C / heads, K * K, rows, columns): the taps of one position at a time are multiplied and summed.
    windows = torch.stack(
        [padded[:, :, y : y + down : stride, x : x + across : stride] for y, x in taps], dim=2
    ).reshape(batch, heads, channels // heads, kernel_size**2, rows, columns)
    per_channel = channel_filter.reshape(batch, scale**2, heads, channels // heads, kernel_size**2, 1, 1)
    per_pixel = spatial_filter.reshape(batch, scale**2, heads, 1, kernel_size**2, rows, columns)
    parts = []
    for position in range(scale**2):
        if combine == reference.MUL:
            terms = windows * per_channel[:, position] * per_pixel[:, position]
        else:
            terms = windows * (per_channel[:, position] + per_pixel[:, position])
        parts.append(terms.sum(dim=3).reshape(batch, channels, rows, columns))
    if scale == 1:
        return parts[0]
    stacked = torch.stack(parts, dim=2).reshape(batch, channels * scale**2, rows, columns)
    return F.pixel_shuffle(stacked, scale)
