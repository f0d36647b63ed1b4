"""What is measured, as rows, JSON and small tables."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ddfup
from ddfup.ops import native
from ddfup.speed.timing import Timing

PARTS = ("op", "module", "network", "end-to-end")
# Only measured if asked for, or there are files to measure.
EXPORT = "export"
# Titles of the tables that hold all cases of a part.
_TITLES = {
    "network": "network, guide {case}",
    "end-to-end": "cold start to file written, guide {case}",
    EXPORT: "exported files, guide {case}",
}


@dataclass(frozen=True)
class Row:
    """One method on one case.

    Attributes:
        part: One of `PARTS`, or `EXPORT`.
        case: What it works on: shapes, sizes.
        method: Who does the work.
        direction: "forward" or "backward".
        threads: CPU threads.
        timing: How long it takes.
        bytes: Memory traffic that cannot be avoided: inputs and outputs, each once.
        copy: Bytes per second that a copy reaches on as many bytes as the op's.
        peak: Bytes of memory; of op and module input, output and in between, of the others the whole process.
        pixels: Of the guide.
        paper: What the paper reports, in the same units: seconds and bytes, each if given.
    """

    part: str
    case: str
    method: str
    direction: str
    threads: int
    timing: Timing
    bytes: int | None = None
    copy: float | None = None
    peak: int | None = None
    pixels: int | None = None
    paper: tuple[float, int | None] | None = None

    @property
    def bandwidth(self) -> float | None:
        """Unavoidable bytes per second."""
        return None if self.bytes is None else self.bytes / self.timing.median

    @property
    def roofline(self) -> float | None:
        """Bandwidth over that of a copy: 1 is what the memory allows."""
        return None if self.bandwidth is None or self.copy is None else self.bandwidth / self.copy

    def record(self) -> dict[str, Any]:
        """Return the row as JSON: seconds, bytes, bytes per second."""
        return {
            "part": self.part,
            "case": self.case,
            "method": self.method,
            "direction": self.direction,
            "threads": self.threads,
            "median_s": self.timing.median,
            "low_s": self.timing.low,
            "high_s": self.timing.high,
            "cpu_s": self.timing.cpu,
            "rounds": self.timing.rounds,
            "bytes": self.bytes,
            "bytes_per_s": self.bandwidth,
            "copy_bytes_per_s": self.copy,
            "roofline": self.roofline,
            "peak_bytes": self.peak,
            "pixels": self.pixels,
            "pixels_per_s": None if self.pixels is None else self.pixels / self.timing.median,
        }


def machine(device: torch.device) -> dict[str, Any]:
    """Describe where the figures come from."""
    status = native.status()
    kernels = status.cuda if device.type == "cuda" else status.cpu
    return {
        "ddfup": ddfup.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "kernels": "native" if kernels.available else "torch",
        "kernels_reason": kernels.reason,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


Lines = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def tables(rows: Sequence[Row]) -> Iterator[Lines]:
    """Lay the rows out in small tables, none wider than 80 characters.

    Yields:
        Title, head and rows of each table.
    """
    for part in (*PARTS, EXPORT):
        mine = [row for row in rows if row.part == part]
        for case in dict.fromkeys(row.case for row in mine):
            chosen = [row for row in mine if row.case == case]
            if part == "op":
                yield _op_table(case, chosen)
            elif part == "module":
                yield _module_table(case, chosen)
            else:
                yield _whole_table(_TITLES[part].format(case=case), chosen)


def _op_table(case: str, rows: Sequence[Row]) -> Lines:
    head = ("", "", "ms", "quartiles", "GB/s", "of copy", "op is x")
    lines: list[tuple[str, ...]] = []
    for direction in dict.fromkeys(row.direction for row in rows):
        chosen = [row for row in rows if row.direction == direction]
        op = next(row for row in chosen if row.method == "op")
        for row in chosen:
            lines.append(
                (
                    direction if row is chosen[0] else "",
                    row.method,
                    *_milliseconds(row.timing),
                    _number(row.bandwidth, 1e9),
                    "-" if row.roofline is None else f"{row.roofline:.0%}",
                    f"{op.timing.median / row.timing.median:.2f}",
                )
            )
    ops = {row.direction: row for row in rows if row.method == "op"}
    forward, backward = ops["forward"], ops["backward"]
    times = backward.timing.median / forward.timing.median
    facts = f"threads: {forward.threads}, {_number(forward.bytes, 1e6)} MB, backward takes {times:.2f} x forward"
    title = f"{case}\n{facts}"
    return title, head, lines


def _module_table(case: str, rows: Sequence[Row]) -> Lines:
    head = ("", "ms", "quartiles", "module is x", "paper", "MB", "module is x", "paper")
    module = next(row for row in rows if row.method == "DDF module")
    lines: list[tuple[str, ...]] = []
    for row in rows:
        theirs = row.paper or (None, None)
        paper = module.paper or (None, None)
        lines.append(
            (
                row.method,
                *_milliseconds(row.timing),
                _ratio(module.timing.median, row.timing.median),
                _ratio(paper[0], theirs[0]),
                _number(row.peak, 1e6, 0),
                _ratio(module.peak, row.peak),
                _ratio(paper[1], theirs[1]),
            )
        )
    return case, head, lines


def _whole_table(title: str, rows: Sequence[Row]) -> Lines:
    head = ("", "threads", "s", "quartiles", "CPU s", "MPixel/s", "MB")
    lines: list[tuple[str, ...]] = [
        (
            row.method,
            str(row.threads),
            f"{row.timing.median:.2f}",
            f"{row.timing.low:.2f}-{row.timing.high:.2f}",
            f"{row.timing.cpu:.2f}",
            _number(None if row.pixels is None else row.pixels / row.timing.median, 1e6, 2),
            _number(row.peak, 1e6, 0),
        )
        for row in rows
    ]
    return title, head, lines


def _milliseconds(timing: Timing) -> tuple[str, str]:
    digits = 3 if timing.median < 1e-3 else 2 if timing.median < 1e-1 else 0
    low, median, high = (f"{1e3 * value:.{digits}f}" for value in (timing.low, timing.median, timing.high))
    return median, f"{low}-{high}"


def _number(value: float | None, unit: float, digits: int = 1) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def _ratio(ours: float | None, other: float | None) -> str:
    return f"{ours / other:.2f}" if ours and other else "-"


def records(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return the rows as JSON."""
    return [row.record() for row in rows]
