"""Times the op beside PyTorch's fallback, unfold, a depth-wise convolution and a plain copy.

Run from the checkout: ``python benchmarks/bench_op.py [--quick] [--json FILE]``. Medians of wall time; the
spread is the distance of the quartiles. A copy of the output's bytes is the floor that memory sets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ddfup.ops import native, reference


class Shape(NamedTuple):
    """What is filtered: (N, C, H, W), window and upsampling factor."""

    batch: int
    channels: int
    height: int
    width: int
    kernel_size: int
    scale: int

    def __str__(self) -> str:
        name = f"ddf_up x{self.scale}" if self.scale > 1 else "ddf"
        return f"{name} ({self.batch}, {self.channels}, {self.height}, {self.width}) K {self.kernel_size}"


class Timing(NamedTuple):
    """One row of the table."""

    shape: str
    direction: str
    method: str
    median_ms: float
    spread_ms: float
    peak_mb: float | None


SHAPES = (
    Shape(1, 32, 240, 320, 3, 2),
    Shape(1, 32, 240, 320, 5, 2),
    Shape(1, 256, 200, 300, 3, 1),
    Shape(2, 256, 200, 300, 3, 1),
)
QUICK = (Shape(1, 16, 60, 80, 3, 2), Shape(1, 32, 60, 80, 3, 1))


def unfold_ddf(features: Tensor, channel: Tensor, spatial: Tensor, scale: int, kernel_size: int) -> Tensor:
    """Filter by laying out every window, as the op is usually written without a kernel."""
    batch, channels, height, width = features.shape
    windows = F.unfold(features, kernel_size, padding=kernel_size // 2)
    windows = windows.reshape(batch, channels, kernel_size**2, height, width)
    filters = spatial.reshape(batch, scale**2, 1, kernel_size**2, height, width)
    weights = channel.reshape(batch, scale**2, channels, kernel_size**2, 1, 1)
    parts = [(windows * weights[:, p] * filters[:, p]).sum(2) for p in range(scale**2)]
    return F.pixel_shuffle(torch.stack(parts, 2).flatten(1, 2), scale)


def measure(shape: Shape, direction: str, method: str, run: Callable[[], object], seconds: float) -> Timing:
    """Time a call until the budget is spent, at least 5 times after 2 warm-ups."""
    cuda = torch.cuda.is_available()
    peak = reset_peak()
    times = []
    for round_ in range(1000):
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        if round_ >= 6 and sum(times) > seconds:
            break
    times = times[2:]
    quartiles = statistics.quantiles(times, n=4)
    return Timing(
        str(shape),
        direction,
        method,
        statistics.median(times) * 1e3,
        (quartiles[2] - quartiles[0]) * 1e3,
        None if peak is None else peak_mb() - peak,
    )


def reset_peak() -> float | None:
    """Forget the process's peak memory and return what it holds now, in MB; None where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return peak_mb()
    except OSError:
        return None


def peak_mb() -> float:
    """Return the peak resident memory since the last reset, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def bench(shape: Shape, dtype: torch.dtype, device: str, layout: torch.memory_format, seconds: float) -> list[Timing]:
    """Time everything for one shape."""
    batch, channels, height, width, k, scale = shape
    positions = scale**2
    features = torch.randn(batch, channels, height, width).to(device, dtype).contiguous(memory_format=layout)
    channel = torch.randn(batch, positions, channels, k, k).to(device, dtype)
    spatial = torch.randn(batch, positions * k * k, height, width).to(device, dtype)
    weights = torch.randn(channels * positions, 1, k, k).to(device, dtype)
    options = (scale, k, 1, 1, 1, 0, 0)
    out = torch.ops.ddfup.ddf(features, channel, spatial, *options)
    grad = torch.randn_like(out)
    conv_grad = torch.randn(batch, channels * positions, height, width).to(device, dtype)
    conv_grad = conv_grad.contiguous(memory_format=layout)
    convolution = (None, [1, 1], [k // 2, k // 2], [1, 1], False, [0, 0], channels, [True, True, False])
    needs = (True, True, True)
    inputs = (features, channel, spatial)
    forward: dict[str, Callable[[], object]] = {
        "kernel": lambda: torch.ops.ddfup.ddf(*inputs, *options),
        "copy of the output": out.clone,
        "depth-wise conv2d": lambda: F.conv2d(features, weights, padding=k // 2, groups=channels),
        "PyTorch fallback": lambda: reference.ddf(*inputs, *options),
        "unfold": lambda: unfold_ddf(*inputs, scale, k),
    }
    backward: dict[str, Callable[[], object]] = {
        "kernel": lambda: torch.ops.ddfup.ddf_backward(grad, *inputs, *options, *needs),
        "depth-wise conv2d": lambda: torch.ops.aten.convolution_backward(conv_grad, features, weights, *convolution),
        "PyTorch fallback": lambda: reference.ddf_backward(grad, *inputs, *options, *needs),
    }
    with torch.no_grad():
        return [
            *(measure(shape, "forward", method, run, seconds) for method, run in forward.items()),
            *(measure(shape, "backward", method, run, seconds) for method, run in backward.items()),
        ]


def table_of(timings: list[Timing], title: str) -> Table:
    """Lay the timings out, each beside its ratio to the kernel's."""
    table = Table(title=title)
    for heading in ("shape", "direction", "method"):
        table.add_column(heading)
    for heading in ("median ms", "spread ms", "x kernel", "memory MB"):
        table.add_column(heading, justify="right")
    kernel = 1.0
    for timing in timings:
        if timing.method == "kernel":
            kernel = timing.median_ms
            table.add_section()
        table.add_row(
            timing.shape if timing.method == "kernel" else "",
            timing.direction if timing.method == "kernel" else "",
            timing.method,
            f"{timing.median_ms:.2f}",
            f"{timing.spread_ms:.2f}",
            f"{timing.median_ms / kernel:.2f}",
            "-" if timing.peak_mb is None else f"{timing.peak_mb:.0f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, few repetitions: a check that it runs")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16", "float64"))
    parser.add_argument("--channels-last", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    timings: list[Timing] = []
    for shape in QUICK if options.quick else SHAPES:
        seconds = 0.05 if options.quick else 1.0
        timings += bench(shape, getattr(torch, options.dtype), options.device, layout, seconds)
    status = native.status()
    kernels = getattr(status, options.device)
    where = f"{options.dtype}, {options.device}, {options.threads} threads, torch {torch.__version__}"
    title = f"{where}; {kernels.reason}"
    console = Console(width=120)
    console.print(table_of(timings, title))
    console.print("memory: peak of the process while the method ran, over what it held before (CPU memory, Linux)")
    if options.json:
        figures = [timing._asdict() for timing in timings]
        options.json.write_text(json.dumps({"title": title, "timings": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
