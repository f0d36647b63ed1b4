"""Decoupled dynamic filtering in plain PyTorch: readable, on any device; oracle and fallback of the kernels.

Shapes and formula as in ``csrc/ddf.h``; S = scale * scale sub-positions, G = heads. Arguments are trusted:
``ddf.py`` checks them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MUL, ADD = 0, 1  # codes of `combine`, as in csrc/ddf.h
ZEROS, REPLICATE = 0, 1  # codes of `padding`, as in csrc/ddf.h


def is_channels_last(features: Tensor) -> bool:
    """Tell whether the output for these features is channels-last.

    Every kernel applies this one rule, and crops of channels-last tensors pass it. It looks only at strides
    of axes longer than one, because compilers are free to change the others.
    """
    return features.size(1) > 1 and features.stride(1) == 1 and not features.is_contiguous()


def empty_following(features: Tensor, shape: list[int]) -> Tensor:
    """Return an uninitialised tensor of that shape in the memory format of the features."""
    memory_format = torch.channels_last if is_channels_last(features) else torch.contiguous_format
    return torch.empty(shape, dtype=features.dtype, device=features.device, memory_format=memory_format)


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
    """Filter the features.

    Args:
        features: (N, C, H, W).
        channel_filter: (N, S, C, K, K).
        spatial_filter: (N, S * G * K * K, ceil(H / stride), ceil(W / stride)).
        scale: Upsampling factor of each axis.
        kernel_size: K, odd.
        stride: Step of the grid on the features.
        dilation: Distance of neighbouring taps.
        heads: G, divides C.
        combine: ``MUL`` or ``ADD``.
        padding: ``ZEROS`` or ``REPLICATE``.

    Returns:
        (N, C, scale * ceil(H / stride), scale * ceil(W / stride)), summed up in float32 (float64 for
        float64).
    """
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    batch, channels, height, width = features.shape
    rows, columns = spatial_filter.shape[2:]
    dilation = min(dilation, max(height, width))  # taps further out than the image see the same padding
    padded = _pad(features.to(wide), kernel_size // 2 * dilation, padding)
    channel = channel_filter.to(wide).reshape(batch, scale**2, heads, channels // heads, kernel_size**2, 1, 1)
    spatial = spatial_filter.to(wide).reshape(batch, scale**2, heads, 1, kernel_size**2, rows, columns)
    total = padded.new_zeros(batch, scale**2, heads, channels // heads, rows, columns)
    for tap in range(kernel_size**2):
        window = _window(padded, tap, kernel_size, stride, dilation, rows, columns)
        window = window.reshape(batch, 1, heads, channels // heads, rows, columns)
        per_channel, per_pixel = channel[:, :, :, :, tap], spatial[:, :, :, :, tap]
        mixed = per_channel * per_pixel if combine == MUL else per_channel + per_pixel
        total.addcmul_(mixed, window)
    # (N, i, j, C, y, x) -> (N, C, y, i, x, j): the pixel shuffle.
    shuffled = total.reshape(batch, scale, scale, channels, rows, columns).permute(0, 3, 4, 1, 5, 2)
    shape = [batch, channels, rows * scale, columns * scale]
    return empty_following(features, shape).copy_(shuffled.reshape(shape))


def ddf_backward(
    grad_output: Tensor,
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
    needs_features: bool,
    needs_channel: bool,
    needs_spatial: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `ddf` for features, channel filter and spatial filter.

    Args:
        grad_output: Gradient of the output, in any memory format.
        features: As given to `ddf`, like all arguments up to ``padding``.
        channel_filter: See `ddf`.
        spatial_filter: See `ddf`.
        scale: See `ddf`.
        kernel_size: See `ddf`.
        stride: See `ddf`.
        dilation: See `ddf`.
        heads: See `ddf`.
        combine: See `ddf`.
        padding: See `ddf`.
        needs_features: Whether the first gradient is wanted.
        needs_channel: Whether the second gradient is wanted.
        needs_spatial: Whether the third gradient is wanted.

    Returns:
        Three tensors shaped like the inputs; those not wanted have shape (0,).
    """
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    batch, channels, height, width = features.shape
    rows, columns = spatial_filter.shape[2:]
    dilation = min(dilation, max(height, width))
    margin = kernel_size // 2 * dilation
    padded = _pad(features.to(wide), margin, padding)
    channel = channel_filter.to(wide).reshape(batch, scale**2, heads, channels // heads, kernel_size**2, 1, 1)
    spatial = spatial_filter.to(wide).reshape(batch, scale**2, heads, 1, kernel_size**2, rows, columns)
    grad = grad_output.to(wide).reshape(batch, channels, rows, scale, columns, scale).permute(0, 3, 5, 1, 2, 4)
    grad = grad.reshape(batch, scale**2, heads, channels // heads, rows, columns)
    grad_padded = torch.zeros_like(padded) if needs_features else padded
    grad_channel, grad_spatial = channel.new_zeros(channel.shape), spatial.new_zeros(spatial.shape)
    for tap in range(kernel_size**2):
        per_channel, per_pixel = channel[:, :, :, :, tap], spatial[:, :, :, :, tap]
        if needs_features:
            mixed = per_channel * per_pixel if combine == MUL else per_channel + per_pixel
            share = (grad * mixed).sum(1).reshape(batch, channels, rows, columns)
            _window(grad_padded, tap, kernel_size, stride, dilation, rows, columns).add_(share)
        if needs_channel or needs_spatial:
            window = _window(padded, tap, kernel_size, stride, dilation, rows, columns)
            product = grad * window.reshape(batch, 1, heads, channels // heads, rows, columns)
            if needs_channel:
                weighted = product * per_pixel if combine == MUL else product
                grad_channel[:, :, :, :, tap] = weighted.sum((4, 5), keepdim=True)
            if needs_spatial:
                weighted = product * per_channel if combine == MUL else product
                grad_spatial[:, :, :, :, tap] = weighted.sum(3, keepdim=True)
    nothing = features.new_empty(0)
    return (
        empty_following(features, list(features.shape)).copy_(_unpad(grad_padded, margin, padding))
        if needs_features
        else nothing,
        grad_channel.reshape(channel_filter.shape).to(channel_filter.dtype) if needs_channel else nothing.clone(),
        grad_spatial.reshape(spatial_filter.shape).to(spatial_filter.dtype) if needs_spatial else nothing.clone(),
    )


def _pad(features: Tensor, margin: int, padding: int) -> Tensor:
    """Surround (N, C, H, W) by a margin of zeros or of the nearest pixels."""
    if padding == ZEROS:
        return F.pad(features, (margin,) * 4)
    return F.pad(features, (margin,) * 4, mode="replicate")


def _unpad(padded: Tensor, margin: int, padding: int) -> Tensor:
    """Take the margin off a gradient; with replicated margins, add it to the pixels it came from."""
    for axis in (2, 3):
        length = padded.size(axis) - 2 * margin
        inner = padded.narrow(axis, margin, length)
        if padding == REPLICATE and margin:
            inner = inner.clone()
            inner.select(axis, 0).add_(padded.narrow(axis, 0, margin).sum(axis))
            inner.select(axis, length - 1).add_(padded.narrow(axis, margin + length, margin).sum(axis))
        padded = inner
    return padded


def _window(padded: Tensor, tap: int, kernel_size: int, stride: int, dilation: int, rows: int, columns: int) -> Tensor:
    """Return the view of the padded features which one tap sees, (N, C, rows, columns)."""
    top, left = tap // kernel_size * dilation, tap % kernel_size * dilation
    bottom, right = top + (rows - 1) * stride + 1, left + (columns - 1) * stride + 1
    return padded[:, :, top:bottom:stride, left:right:stride]
