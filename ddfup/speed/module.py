"""The DDF module beside the convolutions it stands for, at the sizes of the paper's Table 2 and supplement A."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ddfup.models.layers import DDF
from ddfup.ops import ddf
from ddfup.speed.memory import peak_of
from ddfup.speed.results import Row
from ddfup.speed.timing import time_in_turns

Shape = tuple[int, int, int, int]

TABLE_2: Shape = (2, 256, 200, 300)
SUPPLEMENT_A: tuple[Shape, ...] = tuple((32, 256, side, side) for side in (224, 112, 56, 28, 14, 7))
CASES = (TABLE_2, *SUPPLEMENT_A)
QUICK: tuple[Shape, ...] = ((1, 32, 20, 30),)
# Seconds and bytes of the paper, on an RTX 2080 Ti.
PAPER: dict[Shape, dict[str, tuple[float, int | None]]] = {
    TABLE_2: {
        "conv 3 x 3": (7.5e-3, 356 << 20),
        "depth-wise conv": (1.0e-3, 236 << 20),
        "DDF module": (3.0e-3, 246 << 20),
    },
    SUPPLEMENT_A[0]: {
        "conv 3 x 3": (82.6e-3, None),
        "depth-wise conv": (12.0e-3, None),
        "DDF module": (37.1e-3, None),
        "DDF op": (28.6e-3, None),
    },
}


def bench(shape: Shape, *, batch: int, device: torch.device, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """Time the forward passes of one size.

    Args:
        shape: (N, C, H, W) of the features.
        batch: Use no more samples than so many; the paper's ratios are of the whole batch.
        device: Where.
        dtype: Of all tensors.
        seconds: For all methods together.

    Yields:
        One row per method.
    """
    features = torch.randn((min(batch, shape[0]), *shape[1:]), device=device).to(dtype)
    methods = _methods(features)
    with torch.no_grad():
        timings = time_in_turns(methods, seconds=seconds, device=device, kernels=True)
        for name, run in methods.items():
            yield Row(
                "module",
                f"{tuple(features.shape)} {str(dtype).removeprefix('torch.')}",
                name,
                "forward",
                torch.get_num_threads(),
                timings[name],
                peak=peak_of(run, held=features.nbytes, device=device),
                paper=PAPER.get(shape, {}).get(name),
            )


def _methods(features: Tensor) -> dict[str, Callable[[], Tensor]]:
    batch, c, height, width = features.shape
    modules: dict[str, nn.Module] = {
        "conv 3 x 3": nn.Conv2d(c, c, 3, padding=1),
        "depth-wise conv": nn.Conv2d(c, c, 3, padding=1, groups=c),
        "DDF module": DDF(c),
    }
    methods: dict[str, Callable[[], Tensor]] = {}
    for name, module in modules.items():
        ready = module.to(features.device, features.dtype).eval()
        methods[name] = lambda ready=ready: ready(features)  # type: ignore[misc]
    channel = torch.rand(batch, c, 3, 3, device=features.device).to(features.dtype)
    spatial = torch.rand(batch, 9, height, width, device=features.device).to(features.dtype)
    methods["DDF op"] = lambda: ddf(features, channel, spatial, kernel_size=3)
    return methods
