"""The public functions `ddf` and `ddf_up`, and the op behind both: schema, fake, autograd, autocast.

Both run through one op, ``ddfup::ddf``. Its fallback is ``reference.py``; the kernels in ``csrc`` outrank it
once loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddfup.errors import ArgumentError
from ddfup.ops import native, reference

_COMBINE = {"mul": reference.MUL, "add": reference.ADD}
_PADDING = {"zeros": reference.ZEROS, "replicate": reference.REPLICATE}
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# One order everywhere.
_OPTIONS = "int scale, int kernel_size, int stride, int dilation, int heads, int combine, int padding"


def ddf(
    features: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    *,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    heads: int = 1,
    combine: str = "mul",
    padding: str = "zeros",
) -> Tensor:
    """Filter features with a decoupled dynamic filter (Zhou et al., CVPR 2021, eq. 2).

    Every output pixel is the sum over a K x K window of ``mix(channel, spatial) * feature``, where the
    channel filter differs per sample and channel, and the spatial filter per pixel. The combined filter is
    never stored.

    Args:
        features: (N, C, H, W), float64, 32, 16 or bfloat16, contiguous or channels-last without a copy.
        channel_filter: (N, C, K, K).
        spatial_filter: (N, heads * K * K, Ho, Wo) with Ho = ceil(H / stride), Wo = ceil(W / stride).
        kernel_size: K, odd, at least 1.
        stride: Step of the output grid on the features, at least 1.
        dilation: Distance of neighbouring taps in pixels, at least 1.
        heads: Number of spatial filters per pixel, a divisor of C; head g serves the g-th block of C / heads
            channels.
        combine: How the two filters mix: ``mul``, as a product, or ``add``, as a sum.
        padding: What taps outside the image see: ``zeros``, or ``replicate``, the nearest pixel.

    Returns:
        (N, C, Ho, Wo) in the dtype and memory format of the features, summed up in float32 (float64 for
        float64).

    Raises:
        ArgumentError: If a shape, dtype, device or option breaks a rule above.

    Example:
        >>> import torch
        >>> ones = torch.ones(1, 2, 4, 4)
        >>> ddf(ones, torch.ones(1, 2, 3, 3), torch.ones(1, 9, 4, 4), kernel_size=3)[0, 0, 1].tolist()
        [6.0, 9.0, 9.0, 6.0]
    """
    batch, channels, height, width = _check_features(features)
    _check_options(channels, 1, kernel_size, stride, dilation, heads, combine, padding)
    _check_shape("channel_filter", channel_filter, "C, K, K", (batch, channels, kernel_size, kernel_size))
    grid = (-(-height // stride), -(-width // stride))
    _check_shape("spatial_filter", spatial_filter, "heads*K*K, Ho, Wo", (batch, heads * kernel_size**2, *grid))
    features, channel_filter, spatial_filter = _same_kind(features, channel_filter, spatial_filter)
    result: Tensor = torch.ops.ddfup.ddf(
        features,
        channel_filter.unsqueeze(1),
        spatial_filter,
        1,
        kernel_size,
        stride,
        dilation,
        heads,
        _COMBINE[combine],
        _PADDING[padding],
    )
    return result


def ddf_up(
    features: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    *,
    scale: int,
    kernel_size: int,
    dilation: int = 1,
    heads: int = 1,
    combine: str = "mul",
    padding: str = "zeros",
) -> Tensor:
    """Upsample features with scale * scale decoupled dynamic filters (Zhou et al., CVPR 2021, Fig. 5).

    Sub-position i * scale + j of the low-resolution pixel (y, x) becomes row y * scale + i, column x * scale
    + j of the output, which is written once.

    Args:
        features: (N, C, H, W), float64, 32, 16 or bfloat16, contiguous or channels-last without a copy.
        channel_filter: (N, S, C, K, K) with S = scale * scale.
        spatial_filter: (N, S * heads * K * K, H, W), in the order S, heads, K * K.
        scale: Upsampling factor of each axis, at least 1.
        kernel_size: K, odd, at least 1.
        dilation: Distance of neighbouring taps in low-resolution pixels, at least 1.
        heads: Number of spatial filters per pixel, a divisor of C; head g serves the g-th block of C / heads
            channels.
        combine: How the two filters mix: ``mul``, as a product, or ``add``, as a sum.
        padding: What taps outside the image see: ``zeros``, or ``replicate``, the nearest pixel.

    Returns:
        (N, C, scale * H, scale * W) in the dtype and memory format of the features, summed up in float32
        (float64 for float64).

    Raises:
        ArgumentError: If a shape, dtype, device or option breaks a rule above.

    Example:
        >>> import torch
        >>> channel_filter, spatial_filter = torch.ones(1, 4, 2, 3, 3), torch.ones(1, 36, 5, 6)
        >>> ddf_up(torch.ones(1, 2, 5, 6), channel_filter, spatial_filter, scale=2, kernel_size=3).shape
        torch.Size([1, 2, 10, 12])
    """
    batch, channels, height, width = _check_features(features)
    _check_options(channels, scale, kernel_size, 1, dilation, heads, combine, padding)
    positions = scale * scale
    channel_shape = (batch, positions, channels, kernel_size, kernel_size)
    _check_shape("channel_filter", channel_filter, "S, C, K, K", channel_shape)
    spatial_shape = (batch, positions * heads * kernel_size**2, height, width)
    _check_shape("spatial_filter", spatial_filter, "S*heads*K*K, H, W", spatial_shape)
    features, channel_filter, spatial_filter = _same_kind(features, channel_filter, spatial_filter)
    result: Tensor = torch.ops.ddfup.ddf(
        features,
        channel_filter,
        spatial_filter,
        scale,
        kernel_size,
        1,
        dilation,
        heads,
        _COMBINE[combine],
        _PADDING[padding],
    )
    return result


def _check_features(features: Tensor) -> tuple[int, int, int, int]:
    """Return the sizes of the features, all of them positive except the batch."""
    sizes = tuple(features.shape)
    if len(sizes) != 4 or min(sizes[1:]) < 1:
        raise ArgumentError(
            f"features must be (N, C, H, W) with C, H and W at least 1; got {sizes}",
            "add the batch axis with features.unsqueeze(0)" if len(sizes) == 3 else "",
        )
    if features.dtype not in _DTYPES:
        raise ArgumentError(
            f"features must be float32, float64, float16 or bfloat16; got {features.dtype}",
            "convert with features.float()",
        )
    return sizes[0], sizes[1], sizes[2], sizes[3]


def _check_options(
    channels: int,
    scale: int,
    kernel_size: int,
    stride: int,
    dilation: int,
    heads: int,
    combine: str,
    padding: str,
) -> None:
    """Raise ArgumentError unless every option is in its range."""
    numbers = {
        "scale": scale,
        "kernel_size": kernel_size,
        "stride": stride,
        "dilation": dilation,
        "heads": heads,
    }
    for name, value in numbers.items():
        if value < 1:
            raise ArgumentError(f"{name} must be at least 1; got {value}")
    if kernel_size % 2 == 0:
        raise ArgumentError(
            f"kernel_size must be odd, so that the window has a centre; got {kernel_size}",
            f"use {kernel_size - 1} or {kernel_size + 1}",
        )
    if channels % heads:
        raise ArgumentError(f"heads must divide the number of channels, {channels}; got {heads}")
    if combine not in _COMBINE:
        raise ArgumentError(f"combine must be 'mul' or 'add'; got {combine!r}")
    if padding not in _PADDING:
        raise ArgumentError(f"padding must be 'zeros' or 'replicate'; got {padding!r}")


def _check_shape(name: str, value: Tensor, axes: str, expected: tuple[int, ...]) -> None:
    """Raise ArgumentError unless the filter has the expected shape."""
    if tuple(value.shape) != expected:
        raise ArgumentError(f"{name} must be (N, {axes}) = {expected}; got {tuple(value.shape)}")


def _same_kind(features: Tensor, channel_filter: Tensor, spatial_filter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Apply autocast, if it is on, and raise ArgumentError unless all three share dtype and device."""
    tensors = (features, channel_filter, spatial_filter)
    for name, value in zip(("channel_filter", "spatial_filter"), tensors[1:], strict=True):
        if value.device != features.device:
            raise ArgumentError(
                f"{name} must be on the device of the features, {features.device}; got {value.device}",
                f"move it with {name}.to(features.device)",
            )
    kind = features.device.type
    # Meta tensors know no autocast. PyTorch could tell which devices do, but 2.10 and 2.11 cannot compile the question.
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        # As PyTorch's own autocast, leave float64 alone.
        tensors = tuple(value if value.dtype == torch.float64 else value.to(dtype) for value in tensors)  # type: ignore[assignment]
    for name, value in zip(("channel_filter", "spatial_filter"), tensors[1:], strict=True):
        if value.dtype != tensors[0].dtype:
            raise ArgumentError(
                f"{name} must have the dtype of the features, {tensors[0].dtype}; got {value.dtype}",
                f"convert it with {name}.to(features.dtype)",
            )
    return tensors


torch.library.define(
    "ddfup::ddf",
    f"(Tensor features, Tensor channel_filter, Tensor spatial_filter, {_OPTIONS}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "ddfup::ddf_backward",
    f"(Tensor grad_output, Tensor features, Tensor channel_filter, Tensor spatial_filter, {_OPTIONS}, "
    "bool needs_features, bool needs_channel, bool needs_spatial) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("ddfup::ddf", "default")
def _ddf_default(features: Tensor, *rest: Any) -> Tensor:
    # Only called while no native kernel outranks it: the first call tries to load one.
    if native.load(features.device.type):
        outcome: Tensor = torch.ops.ddfup.ddf(features, *rest)
        return outcome
    return reference.ddf(features, *rest)


@torch.library.impl("ddfup::ddf_backward", "default")
def _ddf_backward_default(grad_output: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    if native.load(grad_output.device.type):
        outcome: tuple[Tensor, Tensor, Tensor] = torch.ops.ddfup.ddf_backward(grad_output, *rest)
        return outcome
    return reference.ddf_backward(grad_output, *rest)


def _ddf_fake(features: Tensor, _channel: Tensor, spatial_filter: Tensor, scale: int, *_options: int) -> Tensor:
    rows, columns = spatial_filter.shape[2:]
    return reference.empty_following(features, [*features.shape[:2], rows * scale, columns * scale])


def _ddf_backward_fake(
    _grad_output: Tensor, features: Tensor, channel_filter: Tensor, spatial_filter: Tensor, *options: int
) -> tuple[Tensor, Tensor, Tensor]:
    needs_features, needs_channel, needs_spatial = options[-3:]
    return (
        reference.empty_following(features, list(features.shape)) if needs_features else features.new_empty(0),
        channel_filter.new_empty(channel_filter.shape if needs_channel else (0,)),
        spatial_filter.new_empty(spatial_filter.shape if needs_spatial else (0,)),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _ddf_gradient(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    needs = [bool(needed) for needed in ctx.needs_input_grad[:3]]
    grads = torch.ops.ddfup.ddf_backward(grad_output, *ctx.saved_tensors, *ctx.options, *needs)
    wanted = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return (*wanted, *(None,) * len(ctx.options))


def _no_second_order(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "ddfup::ddf_backward has no derivative: second-order gradients of ddf and ddf_up are not supported; "
        "use ddfup.ops.reference, which plain autograd differentiates any number of times"
    )


torch.library.register_fake("ddfup::ddf", _ddf_fake)
torch.library.register_fake("ddfup::ddf_backward", _ddf_backward_fake)
torch.library.register_autograd("ddfup::ddf", _ddf_gradient, setup_context=_remember)
torch.library.register_autograd("ddfup::ddf_backward", _no_second_order)
