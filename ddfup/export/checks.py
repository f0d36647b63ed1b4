"""Sizes an exported network is tried at, and the comparison with the network itself that it has to pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddfup.errors import ArgumentError, ExportError
from ddfup.export.shapes import MOST_DEPTH

# Largest deviation from the network, over the range of the depth.
TOLERANCE = 1e-5
# The ratios a network is made for.
_RATIOS = (1.0, 32.0)
# Side of the guides tried, in pixels: large enough for several windows of the context encoder at small ratios.
_SIDE = 208

Inputs = tuple[Tensor, Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """One size to try.

    Attributes:
        depth: (height, width).
        guide: (height, width).
        holes: Whether some depth is missing.
    """

    depth: tuple[int, int]
    guide: tuple[int, int]
    holes: bool = True

    @property
    def ratio(self) -> float:
        """Guide over depth."""
        return math.sqrt(self.guide[0] / self.depth[0] * self.guide[1] / self.depth[1])

    def inputs(self) -> Inputs:
        """Make depth (1, 1, h, w), guide (1, 3, H, W) and valid (1, 1, h, w); what is not valid is NaN."""
        generator = torch.Generator().manual_seed(self.depth[0])
        y, x = (torch.linspace(0, 1, side) for side in self.depth)
        plane = 2 + y[:, None] + 0.5 * x + 1.5 * (((7 * x + 5 * y[:, None]) % 2) > 1)
        depth = (plane + 0.02 * torch.rand(self.depth, generator=generator))[None, None]
        guide = torch.rand((1, 3, *self.guide), generator=generator)
        valid = torch.ones(1, 1, *self.depth, dtype=torch.bool)
        if self.holes:
            valid &= torch.rand(valid.shape, generator=generator) > 0.05
            rows, columns = (slice(side // 4, side // 2) for side in self.depth)
            valid[..., rows, columns] = False
        return torch.where(valid, depth, torch.nan), guide, valid


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an export serves.

    Attributes:
        ratio: Asked for.
        ratios: Least and largest ratio that has the same layers; the largest itself is excluded.
        multiple: Of the guide's sides; None: only the sizes of ``cases`` are served.
        example: To trace with.
        cases: To try.
    """

    ratio: float
    ratios: tuple[float, float]
    multiple: int | None
    example: Case
    cases: tuple[Case, ...]


def plan(
    network: nn.Module,
    ratio: float,
    *,
    guide: tuple[int, int] | None = None,
    depth: tuple[int, int] | None = None,
) -> Plan:
    """Say what an export of a network for a ratio serves, and what it is tried at.

    Args:
        network: The network.
        ratio: Guide over depth, 1 to 32.
        guide: (height, width) of the only guide to serve; None: all sizes.
        depth: (height, width) of the only depth to serve; None: that of the guide over the ratio. Only with ``guide``.

    Raises:
        ArgumentError: If the ratio or a size does not fit.
    """
    if guide is not None:
        height, width = depth or (round(guide[0] / ratio), round(guide[1] / ratio))
        if not (0 < height <= guide[0] and 0 < width <= guide[1]):
            raise ArgumentError(
                f"depth must have at least one pixel a side and no more than the guide; got {width}x{height} for "
                f"{guide[1]}x{guide[0]}"
            )
        cases = tuple(Case((height, width), guide, holes) for holes in (True, False))
        exact = cases[0].ratio
        if not _RATIOS[0] <= exact <= _RATIOS[1]:
            raise ArgumentError(f"guide over depth must be 1 to 32; got {exact:g}")
        return Plan(exact, (exact, exact), None, cases[0], cases)
    if not _RATIOS[0] <= ratio <= _RATIOS[1]:
        raise ArgumentError(f"--ratio must be 1 to 32; got {ratio:g}")
    low, high = _same_layers(network, ratio)
    multiple = _multiple(network, ratio)
    rows, columns = (max(least, round(_SIDE / multiple)) for least in (3, 4))
    # Off the ratio, and no two sides equal: what holds of the example by chance must not be built in, such as that the
    # depth lies on a grid of the network's own.
    example = _case(multiple, (rows, columns + 2), min(1.1 * ratio, high), (low, high))
    cases = (
        _case(multiple, (rows + 2, columns), ratio, (low, high)),
        _case(multiple, (rows, 2 * columns + 1), low, (low, high)),
        _case(multiple, (rows + 1, columns), high, (low, high)),
        dataclasses.replace(_case(multiple, (2 * rows + 1, rows), ratio, (low, high)), holes=False),
    )
    return Plan(ratio, (low, high), multiple, example, cases)


def _case(multiple: int, cells: tuple[int, int], ratio: float, ratios: tuple[float, float]) -> Case:
    """A guide of so many cells, and the depth that comes nearest to a ratio within the range."""
    height, width = cells[0] * multiple, cells[1] * multiple
    low, high = ratios
    for step in range(height):
        # The nearest first: 0, 1, -1, 2, -2 ... rows beside the one that the ratio asks for.
        shift = (step + 1) // 2 * (1 if step % 2 else -1)
        h = max(2, round(height / ratio) + shift)
        case = Case((h, max(2, round(width * h / height))), (height, width))
        if low <= case.ratio < high and h <= height and case.depth[1] <= width:
            return case
    raise ArgumentError(f"no depth for a guide of {width}x{height} has a ratio of {low:.3g} to {high:.3g}")


def _same_layers(network: nn.Module, ratio: float) -> tuple[float, float]:
    """The range of ratios about one for which a network has the same layers."""
    level: Callable[[float], int] | None = getattr(network, "level", None)
    if level is None:
        return _RATIOS[0], math.nextafter(_RATIOS[1], math.inf)
    edges = []
    for end in (_RATIOS[0], math.nextafter(_RATIOS[1], math.inf)):
        inside, outside = ratio, end
        if level(end) == level(ratio):
            inside = end
        else:
            # Halve the part of the range in which it changes.
            while abs(outside - inside) > 1e-9 * outside:
                middle = (inside + outside) / 2
                inside, outside = (middle, outside) if level(middle) == level(ratio) else (inside, middle)
        edges.append(inside)
    return edges[0], edges[1]


def _multiple(network: nn.Module, ratio: float) -> int:
    """Side of the cells the network works in; with whole cells nothing is padded."""
    level: Callable[[float], int] | None = getattr(network, "level", None)
    if level is not None:
        return 1 << level(ratio)
    config: Any = network.config
    return int(config.scale)


def compare(network: nn.Module, run: Callable[[Inputs], Tensor], cases: Sequence[Case]) -> float:
    """Compare an exported network with the network itself.

    Args:
        network: The network.
        run: The exported one.
        cases: What to try.

    Returns:
        The largest deviation, over the range of the depth.

    Raises:
        ExportError: If it is more than `TOLERANCE`, or the exported network fails.
    """
    worst = 0.0
    for case in cases:
        inputs = case.inputs()
        depth, _, valid = inputs
        with torch.inference_mode():
            expected = network(*inputs)
        size = f"{case.guide[1]}x{case.guide[0]} with depth of {case.depth[1]}x{case.depth[0]}"
        try:
            found = run(inputs)
        # Each runtime has exceptions of its own.
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ExportError(f"the exported network must run on a guide of {size}; got {reason}") from error
        span = float(depth[valid].max() - depth[valid].min())
        deviation = float((found - expected).abs().max()) / span if found.shape == expected.shape else math.inf
        # Not a number compares as false, and must not pass.
        if not deviation <= TOLERANCE:
            raise ExportError(
                f"the exported network must give what the network gives, to {TOLERANCE:g} of the range of the depth; "
                f"a guide of {size} is off by {deviation:.2g}",
                "nothing was written; please report it",
            )
        worst = max(worst, deviation)
    return worst


__all__ = ["MOST_DEPTH", "TOLERANCE", "Case", "Inputs", "Plan", "compare", "plan"]
