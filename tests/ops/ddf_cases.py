"""Cases, inputs, tolerances and the plain-loop oracle of the op's tests."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

# Largest error allowed, over the largest value of the oracle. Half types: rounding of the result, once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}

LAYOUTS = ("contiguous", "channels_last", "sliced", "cropped_channels_last", "transposed")


class Case(NamedTuple):
    n: int = 2
    c: int = 3
    h: int = 5
    w: int = 7
    k: int = 3
    scale: int = 1
    stride: int = 1
    dilation: int = 1
    heads: int = 1
    combine: str = "mul"
    padding: str = "zeros"

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.h // self.stride), -(-self.w // self.stride)

    @property
    def options(self) -> tuple[int, ...]:
        """The integers after the tensors in the registered ops."""
        codes = int(self.combine == "add"), int(self.padding == "replicate")
        return (self.scale, self.k, self.stride, self.dilation, self.heads, *codes)

    def __str__(self) -> str:
        return "-".join(f"{name}{value}" for name, value in self._asdict().items())


CASES = (
    Case(),
    Case(n=1, c=1, h=1, w=1),
    Case(n=1, c=2, h=1, w=1, k=5, scale=2, padding="replicate"),
    Case(c=2, h=2, w=2, k=7, padding="replicate"),
    Case(c=2, h=3, w=1, k=5),
    Case(k=1),
    Case(k=1, scale=2, combine="add"),
    Case(k=5, combine="add"),
    Case(k=7, c=1, w=9),
    Case(k=9, c=1, n=1, padding="replicate"),
    Case(stride=2),
    Case(stride=2, k=5, w=8, padding="replicate"),
    Case(stride=3, h=7, w=10, combine="add", padding="replicate"),
    Case(stride=3, k=1, h=4),
    Case(dilation=2),
    Case(dilation=2, k=5, padding="replicate", combine="add"),
    Case(dilation=2, stride=3, h=9, w=11),
    Case(dilation=3, stride=2, k=5, padding="replicate"),
    Case(dilation=10**6),
    Case(dilation=10**6, padding="replicate", scale=2),
    Case(scale=2),
    Case(scale=2, k=5, padding="replicate"),
    Case(scale=2, heads=2, c=4, combine="add"),
    Case(scale=3, c=2, combine="add", padding="replicate"),
    Case(scale=3, dilation=2, heads=3),
    Case(scale=4, c=1, n=1),
    Case(heads=3),
    Case(heads=2, c=4, stride=2, padding="replicate"),
    Case(n=1, c=17, h=3, w=16, heads=1),
    Case(n=1, c=1, h=17, w=33),
    Case(n=1, c=1, h=2, w=513),
    Case(n=1, c=1, h=2, w=321, padding="replicate", combine="add"),
)
# One of each kind, for checks that are slow or repeated for many dtypes.
FEW = (
    Case(),
    Case(scale=2, k=5, heads=2, c=4, padding="replicate"),
    Case(stride=2, dilation=2, c=17, combine="add", w=19),
)


def make_inputs(
    case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu", layout: str = "contiguous"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random features, channel filter (N, S, C, K, K) and spatial filter, in the layout asked for."""
    positions, taps = case.scale**2, case.k**2
    features = torch.randn(case.n, case.c, case.h, case.w)
    channel = torch.randn(case.n, positions, case.c, case.k, case.k)
    spatial = torch.randn(case.n, positions * case.heads * taps, *case.grid)
    features, channel, spatial = (value.to(device, dtype) for value in (features, channel, spatial))
    if layout == "channels_last":
        features = features.contiguous(memory_format=torch.channels_last)
    elif layout == "cropped_channels_last":
        wider = features.new_zeros(case.n, case.c, case.h + 3, case.w + 2)
        wider = wider.contiguous(memory_format=torch.channels_last)
        wider[:, :, 1:-2, 1:-1] = features
        features = wider[:, :, 1:-2, 1:-1]
    elif layout == "sliced":
        features = torch.stack((features, features), dim=-1)[..., 0]
        channel = torch.stack((channel, channel), dim=-1)[..., 0]
        spatial = torch.stack((spatial, spatial), dim=2)[:, :, 0]
    elif layout == "transposed":
        features, spatial = (value.mT.contiguous().mT for value in (features, spatial))
        channel = channel.transpose(0, 2).contiguous().transpose(0, 2)
    return features, channel, spatial


def loops(case: Case, features: Tensor, channel: Tensor, spatial: Tensor) -> Tensor:
    """Return the op's result in float64, by the formula and nothing else."""
    image, weights, filters = (value.double().cpu().tolist() for value in (features, channel, spatial))
    rows, columns = case.grid
    out = torch.zeros(case.n, case.c, rows * case.scale, columns * case.scale, dtype=torch.float64)
    for n, c, y, x in product(range(case.n), range(case.c), range(rows), range(columns)):
        head = c // (case.c // case.heads)
        for i, j in product(range(case.scale), range(case.scale)):
            position, total = i * case.scale + j, 0.0
            for u, v in product(range(case.k), range(case.k)):
                row = y * case.stride + (u - case.k // 2) * case.dilation
                column = x * case.stride + (v - case.k // 2) * case.dilation
                inside = 0 <= row < case.h and 0 <= column < case.w
                if case.padding == "zeros" and not inside:
                    continue
                row, column = min(max(row, 0), case.h - 1), min(max(column, 0), case.w - 1)
                first = weights[n][position][c][u][v]
                second = filters[n][(position * case.heads + head) * case.k**2 + u * case.k + v][y][x]
                mixed = first * second if case.combine == "mul" else first + second
                total += mixed * image[n][c][row][column]
            out[n, c, y * case.scale + i, x * case.scale + j] = total
    return out


def assert_close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Compare by the tolerance of the actual dtype."""
    assert actual.shape == expected.shape, what
    if not actual.numel():
        return
    error = (actual.double().cpu() - expected.double().cpu()).abs().max().item()
    largest = max(expected.double().abs().max().item(), 1e-3)
    assert error <= TOLERANCE[actual.dtype] * largest, f"{what}: {error / largest:.3g} of the largest value"
