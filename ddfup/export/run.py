"""One export from start to end: plan, trace, translate, try, and only then write."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from torch import Tensor

import ddfup
from ddfup import models, writing
from ddfup.errors import ArgumentError
from ddfup.export import checks, onnx_file, pt2_file, tracing
from ddfup.export.checks import Inputs
from ddfup.ops.compilers import CXX_HINT

Kind = Literal["onnx", "pt2"]
Content = Literal["program", "compiled"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to export.

    Attributes:
        kind: "onnx" or "pt2".
        model: Name or path of the weights.
        ratio: Guide over depth.
        guide: (width, height) of the only guide to serve; None: all sizes.
        depth: (width, height) of the only depth to serve; None: that of the guide over the ratio.
        content: Of a pt2 file: "program" or "compiled".

    Raises:
        ArgumentError: If settings contradict each other, or there is no compiler.
    """

    kind: Kind
    model: str | Path = models.DEFAULT_MODEL
    ratio: float = 8.0
    guide: tuple[int, int] | None = None
    depth: tuple[int, int] | None = None
    content: Content = "program"

    def __post_init__(self) -> None:
        if self.depth is not None and self.guide is None:
            raise ArgumentError("--depth-size must come with --size; it is missing")
        if self.content == "compiled":
            if self.kind != "pt2":
                raise ArgumentError(f"--content compiled is for pt2 files; got {self.kind}")
            if not pt2_file.has_compiler():
                raise ArgumentError("--content compiled must have a C++ compiler; there is none", CXX_HINT)


@dataclasses.dataclass(frozen=True)
class Exported:
    """An export that passed its checks.

    Attributes:
        data: The file.
        content: "onnx", "program" or "compiled".
        metadata: As in the file; a pt2 file says its ``content`` as well.
        deviation: The largest from the network, over the range of the depth.
        cases: How many sizes were tried.
        seconds: Time it took.
    """

    data: bytes
    content: str
    metadata: dict[str, str]
    deviation: float
    cases: int
    seconds: float


def export(settings: Settings) -> Exported:
    """Export a network, and compare the result with it.

    Raises:
        ArgumentError: If a setting does not fit, or a package is missing.
        WeightsError: If the model is unknown or damaged.
        ExportError: If the network cannot be exported, or the result is not the network's.
    """
    begin = time.perf_counter()
    if settings.kind == "onnx":
        onnx_file.check_packages()
    info = models.find_model(settings.model)
    network = models.load_model(info.path)
    plan = checks.plan(network, settings.ratio, guide=_turned(settings.guide), depth=_turned(settings.depth))
    metadata = _metadata(info, plan)
    program = tracing.trace(network, plan.example.inputs(), multiple=plan.multiple)
    if settings.kind == "onnx":
        content: str = "onnx"
        data = onnx_file.make(program, metadata)
        run = onnx_file.load(data)
    else:
        content, compiled = settings.content, settings.content == "compiled"
        data = pt2_file.make(program, metadata | {"content": content}, compiled=compiled)
        run = _load_pt2(data, compiled)
    deviation = checks.compare(network, run, plan.cases)
    return Exported(data, content, metadata, deviation, len(plan.cases), time.perf_counter() - begin)


def write(path: Path, exported: Exported) -> None:
    """Write the file, whole or not at all.

    Raises:
        OutputError: If that fails.
    """
    writing.write_files({path: exported.data})


def _turned(size: tuple[int, int] | None) -> tuple[int, int] | None:
    return None if size is None else (size[1], size[0])


def _load_pt2(data: bytes, compiled: bool) -> Callable[[Inputs], Tensor]:
    with tempfile.TemporaryDirectory(prefix="ddfup-export-") as folder:
        path = Path(folder) / "model.pt2"
        path.write_bytes(data)
        return pt2_file.load(path, compiled=compiled)


def _metadata(info: models.ModelInfo, plan: checks.Plan) -> dict[str, str]:
    """What the file says of itself."""
    content = {
        "software": f"ddfup {ddfup.__version__}",
        "model": info.name,
        "weights_sha256": info.sha256,
        "ratio": f"{plan.ratio:g}",
    }
    if plan.multiple is None:
        case = plan.example
        return content | {
            "guide_size": f"{case.guide[1]}x{case.guide[0]}",
            "depth_size": f"{case.depth[1]}x{case.depth[0]}",
        }
    low, high = plan.ratios
    return content | {
        "ratio_from": f"{low:.4g}",
        "ratio_below": f"{high:.4g}",
        "guide_multiple": str(plan.multiple),
        "most_depth_side": str(checks.MOST_DEPTH),
    }
