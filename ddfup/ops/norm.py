"""Layer normalisation over the channels of every pixel, which PyTorch's own does one short row at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ddfup.ops import native

# On a GPU PyTorch's own is made for longer rows; ours takes no more (csrc/ddf_kernel_norm.cuh).
_MOST_ON_CUDA = 256


def channel_norm(features: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Normalise the channels of every pixel to zero mean and unit variance, then scale and shift them.

    The native kernels serve inference in float32 with channels last in memory, on a GPU of up to 256 channels;
    everything else is PyTorch's :func:`torch.nn.functional.layer_norm`.

    Args:
        features: (N, C, H, W).
        weight: (C,).
        bias: (C,).
        eps: Added to the variance.

    Returns:
        (N, C, H, W), channels last in memory.
    """
    rows = features.permute(0, 2, 3, 1)
    if _is_served(rows, weight, bias):
        normalized: Tensor = torch.ops.ddfup.channel_norm(rows, weight, bias, eps)
    else:
        normalized = F.layer_norm(rows, weight.shape, weight, bias, eps)
    return normalized.permute(0, 3, 1, 2)


def _is_served(rows: Tensor, weight: Tensor, bias: Tensor) -> bool:
    device = rows.device.type
    fits = device == "cpu" or (device == "cuda" and rows.shape[-1] <= _MOST_ON_CUDA)
    return fits and native.serves_inference(rows, weight, bias)


torch.library.define(
    "ddfup::channel_norm",
    "(Tensor rows, Tensor weight, Tensor bias, float eps) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("ddfup::channel_norm", "default")
def _channel_norm_default(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(rows, weight.shape, weight, bias, eps)


torch.library.register_fake("ddfup::channel_norm", lambda rows, _weight, _bias, _eps: rows.new_empty(rows.shape))
