"""Layer normalisation over the channels of every pixel, which PyTorch's own does one short row at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ddfup.ops import native

# On a GPU PyTorch's own is made for longer rows; ours takes no more (csrc/ddf_kernel_norm.cuh).
_MOST_ON_CUDA = 256
_HALVES = (torch.float16, torch.bfloat16)


def channel_norm(features: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Normalise the channels of every pixel to zero mean and unit variance, then scale and shift them.

    The native kernels serve float32 with channels last in memory: on the CPU inference, on a GPU inference and
    training, of up to 256 channels. Everything else is PyTorch's :func:`torch.nn.functional.layer_norm`. Autocast on a
    GPU means float32, as it does for that.

    Args:
        features: (N, C, H, W).
        weight: (C,).
        bias: (C,).
        eps: Added to the variance.

    Returns:
        (N, C, H, W), channels last in memory.

    Raises:
        NotImplementedError: When second-order gradients are computed of what a native kernel gave.
    """
    rows = features.permute(0, 2, 3, 1)
    if rows.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        # Autocast does so for PyTorch's own, but does not know ours.
        rows, weight, bias = (each.float() if each.dtype in _HALVES else each for each in (rows, weight, bias))
    if _is_served(rows, weight, bias):
        normalized: Tensor = torch.ops.ddfup.channel_norm(rows, weight, bias, eps)
    else:
        normalized = F.layer_norm(rows, weight.shape, weight, bias, eps)
    return normalized.permute(0, 3, 1, 2)


def _is_served(rows: Tensor, weight: Tensor, bias: Tensor) -> bool:
    if rows.device.type == "cuda":
        return rows.shape[-1] <= _MOST_ON_CUDA and native.serves(rows, weight, bias)
    # The kernels of the CPU have no gradients.
    return rows.device.type == "cpu" and native.serves_inference(rows, weight, bias)


torch.library.define(
    "ddfup::channel_norm",
    "(Tensor rows, Tensor weight, Tensor bias, float eps) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "ddfup::channel_norm_backward",
    "(Tensor grad, Tensor rows, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("ddfup::channel_norm", "default")
def _channel_norm_default(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(rows, weight.shape, weight, bias, eps)


@torch.library.impl("ddfup::channel_norm_backward", "default")
def _channel_norm_backward_default(
    grad: Tensor, rows: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape = list(weight.shape)
    _, mean, scale = torch.native_layer_norm(rows, shape, weight, None, eps)
    wanted = [True, True, True]
    # The bias does not matter to its gradient, but only one that is given gets it; it has the shape of the weight.
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
        grad, rows, shape, mean, scale, weight, weight, wanted
    )
    return grads


def _channel_norm_backward_fake(
    _grad: Tensor, rows: Tensor, weight: Tensor, _eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, _bias, ctx.eps = inputs
    ctx.save_for_backward(rows, weight)


def _channel_norm_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.ddfup.channel_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None)


def _no_second_order(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "ddfup::channel_norm_backward has no derivative: second-order gradients of channel_norm are not supported on a "
        "GPU; use torch.nn.functional.layer_norm, or DDFUP_KERNELS=torch for a whole network, which autograd "
        "differentiates any number of times"
    )


torch.library.register_fake("ddfup::channel_norm", lambda rows, _weight, _bias, _eps: rows.new_empty(rows.shape))
torch.library.register_fake("ddfup::channel_norm_backward", _channel_norm_backward_fake)
torch.library.register_autograd("ddfup::channel_norm", _channel_norm_gradient, setup_context=_remember)
torch.library.register_autograd("ddfup::channel_norm_backward", _no_second_order)
