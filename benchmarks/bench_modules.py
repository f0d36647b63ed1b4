"""Times the DDF module and the op beside a 3 x 3 and a depth-wise convolution, at the paper's sizes.

Run from the checkout: ``python benchmarks/bench_modules.py [--table 2|A] [--max-batch N] [--quick] [--json FILE]``.
Table 2 of the paper has (2, 256, 200, 300), its supplement A batches of 32 from 7 x 7 to 224 x 224. Forward passes
without gradients. Time: median of rounds in which the methods take turns, so that a busy machine slows all alike.
Memory: input, output and what is needed in between, as the paper counts it; on the CPU of large shapes only, since
the allocator serves small ones from what it kept.
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
from bench_op import peak_mb, reset_peak
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ddfup.models.layers import DDF
from ddfup.ops import ddf, native


class Shape(NamedTuple):
    """Of the features: (N, C, H, W)."""

    batch: int
    channels: int
    height: int
    width: int


class Row(NamedTuple):
    """What was measured of one method at one shape."""

    shape: Shape
    method: str
    median_ms: float
    spread_ms: float
    memory_mb: float | None


TABLES = {
    "2": (Shape(2, 256, 200, 300),),
    "A": tuple(Shape(32, 256, side, side) for side in (224, 112, 56, 28, 14, 7)),
}
QUICK = (Shape(1, 64, 50, 75), Shape(1, 64, 14, 14))
# From here on glibc takes memory from the system and gives it back at once.
_SMALLEST_MB = 32
# Milliseconds and megabytes of the paper, on an RTX 2080 Ti, whatever the batch: they are shown as ratios.
PAPER: dict[tuple[int, ...], dict[str, tuple[float, int | None]]] = {
    (256, 200, 300): {
        "conv 3 x 3": (7.5, 356),
        "depth-wise conv 3 x 3": (1.0, 236),
        "DDF module": (3.0, 246),
    },
    (256, 224, 224): {
        "conv 3 x 3": (82.6, None),
        "depth-wise conv 3 x 3": (12.0, None),
        "DDF module": (37.1, None),
        "DDF op": (28.6, None),
    },
}


def methods_of(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """Make what is compared, for that number of channels."""
    c = shape.channels
    modules = {
        "conv 3 x 3": nn.Conv2d(c, c, 3, padding=1),
        "depth-wise conv 3 x 3": nn.Conv2d(c, c, 3, padding=1, groups=c),
        "DDF module": DDF(c),
    }
    made: dict[str, Callable[[Tensor], Tensor]] = {
        name: module.to(device, dtype).eval() for name, module in modules.items()
    }
    channel = torch.rand(shape.batch, c, 3, 3, device=device, dtype=dtype)
    spatial = torch.rand(shape.batch, 9, shape.height, shape.width, device=device, dtype=dtype)
    made["DDF op"] = lambda x: ddf(x, channel, spatial, kernel_size=3)
    return made


def memory_of(run: Callable[[Tensor], Tensor], features: Tensor) -> float | None:
    """Measure input, output and the peak in between, in MB; None where the system cannot tell."""
    own = features.numel() * features.element_size() / 2**20
    if features.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(features)
        torch.cuda.synchronize()
        return own + (torch.cuda.max_memory_allocated() - before) / 2**20
    held = reset_peak()
    if held is None or own < _SMALLEST_MB:
        return None
    run(features)
    return own + peak_mb() - held


def bench(shape: Shape, device: str, dtype: torch.dtype, seconds: float) -> list[Row]:
    """Measure every method at one shape."""
    features = torch.randn(shape, device=device, dtype=dtype)
    methods = methods_of(shape, device, dtype)
    for run in methods.values():
        run(features)
        run(features)
    memory = {name: memory_of(run, features) for name, run in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in methods}
    begin = time.perf_counter()
    while len(times["DDF op"]) < 5 or time.perf_counter() - begin < seconds:
        for name, run in methods.items():
            if features.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run(features)
            if features.is_cuda:
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    rows = []
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        rows.append(Row(shape, name, statistics.median(values), high - low, memory[name]))
    return rows


def table_of(rows: list[Row], title: str) -> Table:
    """Lay the rows out beside the paper's ratios: the module's over each method's."""
    table = Table(title=title)
    for heading in ("shape", "method"):
        table.add_column(heading)
    for heading in ("median ms", "spread ms", "DDF module is x", "paper", "MB", "DDF module is x", "paper"):
        table.add_column(heading, justify="right")
    modules = {row.shape: row for row in rows if row.method == "DDF module"}
    for row in rows:
        first = row.method == "conv 3 x 3"
        if first:
            table.add_section()
        module, paper = modules[row.shape], PAPER.get(row.shape[1:], {})
        ours = (row.median_ms, row.memory_mb), (module.median_ms, module.memory_mb)
        theirs = paper.get(row.method, (None, None)), paper.get("DDF module", (None, None))
        cells = [
            f"{row.median_ms:.2f}",
            f"{row.spread_ms:.2f}",
            _ratio(ours[1][0], ours[0][0]),
            _ratio(theirs[1][0], theirs[0][0]),
            "-" if row.memory_mb is None else f"{row.memory_mb:.0f}",
            _ratio(ours[1][1], ours[0][1]),
            _ratio(theirs[1][1], theirs[0][1]),
        ]
        table.add_row(str(tuple(row.shape)) if first else "", row.method, *cells)
    return table


def _ratio(ours: float | None, other: float | None) -> str:
    return f"{ours / other:.2f}" if ours and other else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", default="2", choices=("2", "A"), help="of the paper")
    parser.add_argument("--max-batch", type=int, default=32, help="cut batches, for slow machines and small memories")
    parser.add_argument("--quick", action="store_true", help="small shapes, few repetitions: a check that it runs")
    parser.add_argument("--seconds", type=float, default=3.0, help="per shape, at least 5 rounds")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16", "float64"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = QUICK if options.quick else TABLES[options.table]
    rows: list[Row] = []
    with torch.no_grad():
        for shape in shapes:
            shape = shape._replace(batch=min(shape.batch, options.max_batch))
            seconds = 0.1 if options.quick else options.seconds
            rows += bench(shape, options.device, getattr(torch, options.dtype), seconds)
    reason = getattr(native.status(), options.device).reason
    where = f"{options.dtype}, {options.device}, {options.threads} threads, torch {torch.__version__}"
    title = f"{where}; {reason}"
    Console(width=140).print(table_of(rows, title))
    if options.json:
        figures = [row._asdict() for row in rows]
        options.json.write_text(json.dumps({"title": title, "rows": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
