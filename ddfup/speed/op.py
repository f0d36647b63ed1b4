"""The op against what the memory allows, a depth-wise convolution, the PyTorch kernels and plain unfolding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import ddfup.ops  # noqa: F401  (registers the op)
from ddfup.ops import reference
from ddfup.speed.results import Row
from ddfup.speed.timing import time_in_turns


@dataclass(frozen=True)
class Case:
    """What is filtered.

    Attributes:
        shape: (N, C, H, W) of the features.
        kernel_size: K.
        scale: Upsampling factor.
        channels_last: Whether pixels rather than planes lie together.
    """

    shape: tuple[int, int, int, int]
    kernel_size: int = 3
    scale: int = 1
    channels_last: bool = False

    def __str__(self) -> str:
        name = f"ddf_up x{self.scale}" if self.scale > 1 else "ddf"
        layout = " channels-last" if self.channels_last else ""
        return f"{name} {self.shape} K {self.kernel_size}{layout}"

    def spatial_shape(self) -> tuple[int, int, int, int]:
        """Return the shape of the spatial filters, (N, S * K * K, H, W)."""
        n, _, h, w = self.shape
        return n, (self.scale * self.kernel_size) ** 2, h, w

    def bytes(self, direction: str, itemsize: int) -> int:
        """Count the bytes that have to move: every tensor once; the channel filter is too small to count.

        Forward: features and spatial filters in, output out. Backward: those and the output's gradient in, the
        gradients of features and spatial filters out.
        """
        n, c, h, w = self.shape
        features, spatial, out = n * c * h * w, n * self.spatial_shape()[1] * h * w, n * c * h * w * self.scale**2
        return itemsize * (features + spatial + out + (features + spatial if direction == "backward" else 0))


# Those of the paper's table, of a joint upsampling network, and what is easily slow: large windows, odd sizes.
CASES = (
    Case((1, 32, 240, 320), 3, 2),
    Case((1, 32, 240, 320), 5, 2),
    Case((1, 32, 240, 321), 7, 2),
    Case((1, 256, 200, 300)),
    Case((2, 256, 200, 300)),
    Case((1, 64, 240, 320), channels_last=True),
    Case((1, 63, 121, 163), 5),
    Case((1, 32, 30, 40), 3, 2),
)
GPU_CASES = (*CASES, Case((32, 256, 224, 224)), Case((1, 64, 1080, 1920), 3, 2))
QUICK = (Case((1, 8, 30, 41), 3, 2), Case((1, 16, 30, 40), 5, channels_last=True))


def bench(case: Case, *, device: torch.device, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """Time one case in both directions.

    Args:
        case: Shapes and layout.
        device: Where.
        dtype: Of all tensors.
        seconds: Per direction.

    Yields:
        One row per direction and method. "copy" moves as many bytes as the op must, half of them read and half of
        them written, into memory at hand; "copy, new memory" asks the system for it, as everything does that returns
        a large tensor.
    """
    for direction, methods in _methods(case, device, dtype).items():
        calls = {name: run for name, (run, _) in methods.items()}
        with torch.no_grad():
            # By itself and seldom: it takes long, and its many large tensors slow whatever follows it.
            slow: dict[str, Callable[[], object]] = {}
            for name in ("PyTorch kernels", "unfold"):
                if name in calls:
                    slow[name] = calls.pop(name)
            timings = time_in_turns(calls, seconds=seconds, device=device, kernels=True)
            timings |= time_in_turns(slow, seconds=seconds / 4, device=device, rounds=3, kernels=True)
        copy = methods["copy"][1] / timings["copy"].median
        for name, (_, moved) in methods.items():
            title = f"{case} {str(dtype).removeprefix('torch.')}"
            threads = torch.get_num_threads()
            yield Row("op", title, name, direction, threads, timings[name], bytes=moved, copy=copy)


def _methods(
    case: Case, device: torch.device, dtype: torch.dtype
) -> dict[str, dict[str, tuple[Callable[[], object], int]]]:
    """Direction -> method -> what to run, and the bytes that it has to move."""
    batch, channels, height, width = case.shape
    k, scale = case.kernel_size, case.scale
    layout = torch.channels_last if case.channels_last else torch.contiguous_format

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    features = random(*case.shape).contiguous(memory_format=layout)
    channel = random(batch, scale**2, channels, k, k)
    inputs = (features, channel, random(*case.spatial_shape()))
    options = (scale, k, 1, 1, 1, reference.MUL, reference.ZEROS)
    grad = torch.randn_like(torch.ops.ddfup.ddf(*inputs, *options))
    # As many filters per channel, so that as many numbers come out.
    weights = random(channels * scale**2, 1, k, k)
    conv_grad = random(batch, channels * scale**2, height, width).contiguous(memory_format=layout)
    convolution = (None, [1, 1], [k // 2, k // 2], [1, 1], False, [0, 0], channels, [True, True, False])
    moved = {direction: case.bytes(direction, dtype.itemsize) for direction in ("forward", "backward")}
    # What a depth-wise convolution reads and writes: its filters are no tensors to speak of.
    dense = dtype.itemsize * (features.numel() + conv_grad.numel())
    needs = (True, True, True)
    methods: dict[str, dict[str, tuple[Callable[[], object], int]]] = {
        "forward": {
            "op": (lambda: torch.ops.ddfup.ddf(*inputs, *options), moved["forward"]),
            **_copies(moved["forward"], device),
            "depth-wise conv": (lambda: F.conv2d(features, weights, padding=k // 2, groups=channels), dense),
            "PyTorch kernels": (lambda: reference.ddf(*inputs, *options), moved["forward"]),
            "unfold": (lambda: unfold(*inputs, k, scale), moved["forward"]),
        },
        "backward": {
            "op": (lambda: torch.ops.ddfup.ddf_backward(grad, *inputs, *options, *needs), moved["backward"]),
            **_copies(moved["backward"], device),
            "depth-wise conv": (
                lambda: torch.ops.aten.convolution_backward(conv_grad, features, weights, *convolution),
                dense + dtype.itemsize * features.numel(),
            ),
            "PyTorch kernels": (lambda: reference.ddf_backward(grad, *inputs, *options, *needs), moved["backward"]),
        },
    }
    # On the CPU, and for larger windows, it would compile for minutes.
    if device.type == "cuda" and k <= 3:
        # Every case anew: beyond eight shapes a function is no longer compiled.
        torch.compiler.reset()
        forward, backward = (torch.compile(f, dynamic=False) for f in (reference.ddf, reference.ddf_backward))
        methods["forward"]["torch.compile"] = (lambda: forward(*inputs, *options), moved["forward"])
        methods["backward"]["torch.compile"] = (lambda: backward(grad, *inputs, *options, *needs), moved["backward"])
    return methods


def unfold(features: Tensor, channel: Tensor, spatial: Tensor, kernel_size: int, scale: int) -> Tensor:
    """Filter as people do without an op of their own: unfolded windows, S results, a stack and a pixel shuffle.

    Args:
        features: (N, C, H, W).
        channel: (N, S, C, K, K).
        spatial: (N, S * K * K, H, W).
        kernel_size: K.
        scale: Upsampling factor; S is its square.

    Returns:
        (N, C, scale * H, scale * W).
    """
    n, c, h, w = features.shape
    windows = F.unfold(features, kernel_size, padding=kernel_size // 2).view(n, c, -1, h * w)
    weights = spatial.reshape(n, scale**2, 1, kernel_size**2, h * w)
    results = [
        (windows * channel[:, s].reshape(n, c, -1, 1) * weights[:, s]).sum(dim=2).view(n, c, h, w)
        for s in range(scale**2)
    ]
    return F.pixel_shuffle(torch.stack(results, dim=2).flatten(1, 2), scale)


def _copies(moved: int, device: torch.device) -> dict[str, tuple[Callable[[], object], int]]:
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"copy": (lambda: target.copy_(source), moved), "copy, new memory": (source.clone, moved)}
