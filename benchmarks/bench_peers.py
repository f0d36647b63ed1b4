"""Times the networks and the op beside what others have on PyPI, on the same depth and guide, taking turns.

Run from the checkout: ``pip install 'ddfup[bench]'``, then ``python benchmarks/bench_peers.py [--size WxH] [--ratio N]
[--quick] [--json FILE]``. First table: from low-resolution depth and guide to high-resolution depth; the filters smooth
OpenCV's cubic enlargement, in windows of 9 x 9. opencv-python is without the guided filters of the contributed modules:
its own bilateral filter does not look at the guide, and the guided filter is made of its box filter. Second table: the
op beside the same sums by ``unfold``, as they are written without a kernel.

Speed only: how good the results are `ddfup benchmark` says, which has filters of the same kinds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch
from guided_filter_pytorch.guided_filter import FastGuidedFilter, GuidedFilter
from kornia.filters import guided_blur, joint_bilateral_blur
from torch import Tensor
from torch.nn import functional as F

from ddfup import io
from ddfup.inference import Upsampler
from ddfup.models import list_models
from ddfup.ops import ddf_up
from ddfup.speed import results
from ddfup.speed.memory import peak_of
from ddfup.speed.pairs import make_pair
from ddfup.speed.timing import time_in_turns
from ddfup.terminal import print_table

CPU = torch.device("cpu")
WINDOW = 9
EPSILON = 1e-3


def box_guided_filter(image: np.ndarray, guide: np.ndarray) -> np.ndarray:
    """The guided filter of a grey guide, from OpenCV's box filter."""

    def mean(values: np.ndarray) -> np.ndarray:
        return cv2.blur(values, (WINDOW, WINDOW))

    mean_guide, mean_image = mean(guide), mean(image)
    slope = (mean(guide * image) - mean_guide * mean_image) / (mean(guide * guide) - mean_guide**2 + EPSILON)
    return mean(slope) * guide + mean(mean_image - slope * mean_guide)


def upsamplers(size: tuple[int, int], ratio: float) -> dict[str, Callable[[], object]]:
    """Everything that makes high-resolution depth of the same pair."""
    depth, guide = make_pair(size, ratio)
    low = torch.from_numpy(depth)[None, None]
    colour = torch.from_numpy(guide).permute(2, 0, 1)[None].float() / 255
    grey = colour.mean(1, keepdim=True)
    small_grey = F.interpolate(grey, low.shape[-2:], mode="area")
    grey_image = grey[0, 0].numpy()
    slow, fast = GuidedFilter(WINDOW // 2, EPSILON), FastGuidedFilter(1, EPSILON)

    def enlarged() -> np.ndarray:
        return cv2.resize(depth, size, interpolation=cv2.INTER_CUBIC)

    def tensor() -> Tensor:
        return torch.from_numpy(enlarged())[None, None]

    sigma = (WINDOW / 4, WINDOW / 4)
    methods: dict[str, Callable[[], object]] = {}
    for info in list_models():
        network = Upsampler(info.name, device="cpu")
        methods[f"ddfup {info.name}"] = lambda network=network: network(depth, guide)
    return methods | {
        "OpenCV cubic": enlarged,
        "OpenCV bilateral, unguided": lambda: cv2.bilateralFilter(enlarged(), WINDOW, 0.1, WINDOW / 4),
        "OpenCV box guided filter": lambda: box_guided_filter(enlarged(), grey_image),
        "kornia joint bilateral": lambda: joint_bilateral_blur(tensor(), colour, WINDOW, 0.1, sigma),
        "kornia guided blur": lambda: guided_blur(colour, tensor(), WINDOW, EPSILON),
        "guided-filter-pytorch": lambda: slow(grey, tensor()),
        "the same, fast": lambda: fast(small_grey, low, grey),
    }


def ops(quick: bool) -> dict[str, Callable[[], object]]:
    """The op and the same sums without it."""
    batch, channels, height, width, k, scale = (1, 8, 24, 32, 3, 2) if quick else (1, 32, 240, 320, 3, 2)
    features = torch.randn(batch, channels, height, width)
    channel = torch.randn(batch, scale**2, channels, k, k)
    spatial = torch.randn(batch, scale**2 * k * k, height, width)

    def unfolded() -> Tensor:
        windows = F.unfold(features, k, padding=k // 2).reshape(batch, channels, k * k, height, width)
        filters = spatial.reshape(batch, scale**2, 1, k * k, height, width)
        weights = channel.reshape(batch, scale**2, channels, k * k, 1, 1)
        parts = [(windows * weights[:, p] * filters[:, p]).sum(2) for p in range(scale**2)]
        return F.pixel_shuffle(torch.stack(parts, 2).flatten(1, 2), scale)

    def op() -> Tensor:
        return ddf_up(features, channel, spatial, scale=scale, kernel_size=k)

    torch.testing.assert_close(op(), unfolded(), rtol=1e-4, atol=1e-4)
    return {f"ddf_up {(batch, channels, height, width)} x{scale} K {k}": op, "the same by unfold": unfolded}


def compare(methods: dict[str, Callable[[], object]], seconds: float) -> list[dict[str, object]]:
    """Time all methods; print them with their ratio to the first."""
    with torch.inference_mode():
        timings = time_in_turns(methods, seconds=seconds, device=CPU)
        # From the least on, so that what one of them left behind serves no other.
        peaks = {name: peak_of(run, held=1 << 30, device=CPU) for name, run in methods.items()}
    first = next(iter(timings.values()))
    rows, lines = [], []
    for name, timing in timings.items():
        peak = peaks[name]
        memory = None if peak is None else peak - (1 << 30)
        ratio = timing.median / first.median
        row = {"method": name, "median_s": timing.median, "low_s": timing.low, "high_s": timing.high}
        rows.append(row | {"cpu_s": timing.cpu, "rounds": timing.rounds, "extra_bytes": memory, "ratio": ratio})
        quartiles = f"{1e3 * timing.low:.1f}-{1e3 * timing.high:.1f}"
        extra = "-" if memory is None else f"{memory / 1e6:.0f}"
        cells = (f"{1e3 * timing.median:.1f}", quartiles, f"{1e3 * timing.cpu:.1f}", f"{ratio:.3f}", extra)
        lines.append((name, *cells))
    print_table(("", "ms", "quartiles", "CPU ms", "x first", "MB more"), lines)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="640x480", help="of the guide, WIDTHxHEIGHT")
    parser.add_argument("--ratio", type=float, default=8, help="guide over depth")
    parser.add_argument("--quick", action="store_true", help="a small guide, few rounds: a check that it runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads, OpenCV's too")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    size = (128, 96) if options.quick else io.parse_size(options.size)
    seconds = 0.01 if options.quick else 5.0
    print(f"{size[0]}x{size[1]}, ratio {options.ratio:g}, threads: {options.threads}, torch {torch.__version__}")
    tables = [compare(upsamplers(size, options.ratio), seconds)]
    print()
    tables.append(compare(ops(options.quick), seconds / 2))
    if options.json:
        content = {"machine": results.machine(CPU), "size": size, "threads": options.threads, "tables": tables}
        options.json.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
