"""From a network to one graph for all sizes, by ``torch.export``.

The networks compute with Python's numbers: sizes, ratios, levels. While they are traced those are symbols, and what
would turn a symbol into the number of the example is replaced here. Whether anything has slipped through, the checks
of :mod:`ddfup.export.checks` tell: they run the result at other sizes and ratios than those of the example.
"""

from __future__ import annotations

import builtins
import contextlib
import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import ddfup.ops  # noqa: F401  (registers the op)
from ddfup.export import decompose, shapes
from ddfup.models import context, sampling


class Whole(nn.Module):
    """A network whose guide's sides are multiples of a number: it says so to the tracer.

    Args:
        network: From (depth, guide, valid) to the result.
        multiple: The number.
    """

    def __init__(self, network: nn.Module, multiple: int) -> None:
        super().__init__()
        self.network, self.multiple = network, multiple

    def forward(self, depth: Tensor, guide: Tensor, valid: Tensor) -> Tensor:
        """Upsample; arguments as of :meth:`ddfup.models.pyramid.GuidedPyramid.forward`, a batch of one."""
        m = self.multiple
        height, width = guide.shape[-2] // m, guide.shape[-1] // m
        cells = guide.reshape(1, 3, height, m, width, m)
        result: Tensor = self.network(depth, cells.reshape(1, 3, height * m, width * m), valid)
        return result


def trace(network: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], *, multiple: int | None) -> ExportedProgram:
    """Trace a network; the op comes out in standard operators.

    Args:
        network: In evaluation mode.
        inputs: Example of depth (1, 1, h, w), guide (1, 3, H, W) and valid (1, 1, h, w); the ratio decides which
            parts of the network there are.
        multiple: Sides of the guide are multiples of it and all sizes are free; None: those of the example are the
            only ones.
    """
    module = network if multiple is None else Whole(network, multiple)
    free = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with (
        torch.no_grad(),
        _symbols(),
        mock.patch.object(torch.ops.ddfup, "ddf", decompose.ddf),
        without_cache(),
    ):
        program = torch.export.export(
            module.eval(), inputs, dynamic_shapes=None if multiple is None else (free,) * 3, strict=False
        )
    # Beside the sizes that the checks have shown to be right, what was merely seen to hold of the example.
    program._guards_code = []
    return program


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Let shapes be computed anew for every operator: with symbols the cache's keys cost more than it saves."""
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


class _Overlay:
    """A module with some names replaced."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        self.__dict__.update(names)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _network_modules() -> list[ModuleType]:
    return [module for name, module in sorted(sys.modules.items()) if name.startswith("ddfup.models.")]


@contextlib.contextmanager
def _symbols() -> Iterator[None]:
    """Let the networks compute with symbols where they compute with numbers."""
    arithmetic = _Overlay(math, sqrt=_sqrt, log2=_log2)
    with contextlib.ExitStack() as stack:
        for module in _network_modules():
            names: dict[str, Any] = {"len": _len, "round": _round}
            if hasattr(module, "math"):
                names["math"] = arithmetic
            if getattr(module, "fill_holes", None) is sampling.fill_holes:
                names["fill_holes"] = shapes.fill_holes
            for name, value in names.items():
                stack.enter_context(mock.patch.object(module, name, value, create=True))
        stack.enter_context(mock.patch.object(context.ContextEncoder, "forward", shapes.describe))
        stack.enter_context(mock.patch.object(torch.SymInt, "__truediv__", _divide))
        yield


_true_divide: Any = torch.SymInt.__truediv__
# Untyped in PyTorch.
_sym_int: Any = torch.sym_int


def _divide(length: torch.SymInt, step: Any) -> Any:
    """Divide; a quotient that is whole whatever the size stays a whole number, which further sizes follow from."""
    if isinstance(step, int | float) and float(step).is_integer():
        terms = length.node.expr.as_ordered_terms()
        if all(factor.is_Integer and int(factor) % int(step) == 0 for factor, _ in (t.as_coeff_Mul() for t in terms)):
            return length // int(step)
    return _true_divide(length, step)


def _len(items: Any) -> Any:
    return items.shape[0] if isinstance(items, Tensor) else builtins.len(items)


def _round(value: Any) -> Any:
    # Lengths are positive; files cannot hold the rounding of a symbol.
    if not isinstance(value, torch.SymFloat):
        return builtins.round(value)
    symbol: Any = value
    return _sym_int(symbol + 0.5)


def _sqrt(value: Any) -> Any:
    # ONNX has no root of a symbol.
    return value**0.5 if isinstance(value, torch.SymFloat) else math.sqrt(value)


def _log2(value: Any) -> float:
    # What a network decides by the ratio's logarithm, it decides for the example's.
    return math.log2(value.node.hint if isinstance(value, torch.SymFloat) else value)
