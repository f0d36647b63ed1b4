"""Spatial filters that are positive and sum to one, predicted from features in one pass over the pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from ddfup.ops import native


def convex_filters(guidance: Tensor, weight: Tensor, bias: Tensor, *, taps: int) -> Tensor:
    """Apply a 1 x 1 convolution and, to the taps of every filter, the softmax.

    The native kernel serves inference in float32 on the CPU with channels last in memory; everything else is PyTorch's
    matrix product and softmax.

    Args:
        guidance: (N, C, H, W).
        weight: (S * taps, C).
        bias: (S * taps,).
        taps: Numbers of a filter, K * K.

    Returns:
        (N, S * taps, H, W), at least float32: in half precision the numbers would not sum to one.
    """
    rows = guidance.permute(0, 2, 3, 1)
    fits = rows.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    if fits and native.serves_inference(rows, weight, bias):
        filters: Tensor = torch.ops.ddfup.convex_filters(rows, weight, bias, taps)
        return filters
    return _by_pytorch(guidance, weight, bias, taps)


def _by_pytorch(guidance: Tensor, weight: Tensor, bias: Tensor, taps: int) -> Tensor:
    # As a matrix product: its planes come out as the op reads them, whatever comes in.
    n, _, h, w = guidance.shape
    planes = torch.baddbmm(bias[:, None], weight.expand(n, -1, -1), guidance.flatten(2))
    stacked = planes.view(n, weight.shape[0] // taps, taps, h, w)
    shares = stacked.softmax(dim=2, dtype=torch.promote_types(stacked.dtype, torch.float32))
    return shares.flatten(1, 2)


torch.library.define(
    "ddfup::convex_filters",
    "(Tensor rows, Tensor weight, Tensor bias, int taps) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("ddfup::convex_filters", "default")
def _convex_filters_default(rows: Tensor, weight: Tensor, bias: Tensor, taps: int) -> Tensor:
    return _by_pytorch(rows.permute(0, 3, 1, 2), weight, bias, taps)


torch.library.register_fake(
    "ddfup::convex_filters",
    lambda rows, weight, _bias, _taps: rows.new_empty(rows.shape[0], weight.shape[0], *rows.shape[1:3]),
)
