"""What is shown and written of a benchmark: means, tables of 80 columns, JSON, CSV."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ddfup.benchmark.measures import describe_measures
from ddfup.benchmark.protocols import PROTOCOLS, Setup
from ddfup.benchmark.run import Record
from ddfup.metrics import Metric, mean_figures
from ddfup.tables import csv_bytes

_WIDTH = 80


@dataclass(frozen=True)
class Mean:
    """One cell of the tables.

    Attributes:
        degradation: How the low resolution was made.
        factor: High-resolution over low-resolution length.
        method: Name of the method.
        images: Number of images.
        seconds: Mean time of the method.
        figures: Measure -> mean over images; NaN where it is defined for none.
    """

    degradation: str
    factor: float
    method: str
    images: int
    seconds: float
    figures: dict[str, float]


def means(records: Iterable[Record]) -> list[Mean]:
    """Average over images, in the order in which degradations, factors and methods first occur."""
    groups: dict[tuple[str, float, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.degradation, record.factor, record.method), []).append(record)
    return [
        Mean(*key, len(group), math.fsum(r.seconds for r in group) / len(group), mean_figures(r.figures for r in group))
        for key, group in groups.items()
    ]


def unit_of(metric: Metric, setup: Setup) -> str:
    """Return the unit in which a measure is reported; may be empty."""
    return {"depth": setup.unit, "share": "%", "dB": "dB", "number": ""}[metric.unit]


def tables(cells: Sequence[Mean], setup: Setup, metric: str) -> list[tuple[str, list[str], list[list[str]]]]:
    """Lay out one measure: per degradation a title, a head and rows, none wider than 80 columns.

    Args:
        cells: Of `means`.
        setup: What was measured.
        metric: Name of a measure.
    """
    meaning = describe_measures(setup.thresholds)[metric]
    unit = unit_of(meaning, setup)
    values = {(cell.degradation, cell.factor, cell.method): cell.figures[metric] for cell in cells}
    names = list(dict.fromkeys(cell.method for cell in cells))
    # A name may be of any length (weight files say theirs), the table not.
    shown = {name: name if len(name) <= 32 else f"{name[:31]}…" for name in names}
    label_width = max(len(text) for text in [*shown.values(), "method"])
    found = []
    for degradation in dict.fromkeys(cell.degradation for cell in cells):
        text = {
            (factor, name): _format(values[degradation, factor, name], meaning)
            for factor in setup.factors
            for name in names
        }
        width = max(len(cell) for cell in [*text.values(), *(f"x{factor:g}" for factor in setup.factors)])
        step = max(1, (_WIDTH - label_width) // (width + 2))
        for begin in range(0, len(setup.factors), step):
            part = setup.factors[begin : begin + step]
            title = f"{meaning.label}{f' ({unit})' if unit else ''}, {degradation} low resolution"
            head = ["method", *(f"x{factor:g}".rjust(width) for factor in part)]
            rows = [[shown[name], *(text[factor, name].rjust(width) for factor in part)] for name in names]
            found.append((title, head, rows))
    return found


def _format(value: float, metric: Metric) -> str:
    if not math.isfinite(value):
        return "-"
    if metric.unit == "share":
        return f"{100 * value:.2f}"
    return f"{value:.4f}" if metric.unit == "number" else f"{value:.2f}"


@dataclass(frozen=True)
class Entry:
    """One number of a page's table.

    Attributes:
        text: As people read it.
        share: Of the largest number of the measure at this factor, 0 to 1: the length of its bar.
        best: Whether no method does better.
    """

    text: str
    share: float
    best: bool


@dataclass(frozen=True)
class Table:
    """One measure under one degradation.

    Attributes:
        metric: Name of the measure.
        meaning: What it measures.
        unit: May be empty.
        degradation: How the low resolution was made.
        columns: Factors, as people read them.
        rows: Method and its entries.
    """

    metric: str
    meaning: Metric
    unit: str
    degradation: str
    columns: list[str]
    rows: list[tuple[str, list[Entry]]]


def page_tables(cells: Sequence[Mean], setup: Setup) -> list[Table]:
    """Lay out all measures for a page, those left out that no method has a number for."""
    values = {(cell.degradation, cell.factor, cell.method): cell.figures for cell in cells}
    methods = list(dict.fromkeys(cell.method for cell in cells))
    found = []
    for metric, meaning in describe_measures(setup.thresholds).items():
        for degradation in dict.fromkeys(cell.degradation for cell in cells):
            rows: dict[str, list[Entry]] = {method: [] for method in methods}
            for factor in setup.factors:
                column = {method: values[degradation, factor, method][metric] for method in methods}
                finite = [value for value in column.values() if math.isfinite(value)]
                best = (min if meaning.better == "lower" else max)(finite, default=math.nan)
                longest = max((abs(value) for value in finite), default=0) or 1
                for method, value in column.items():
                    share = abs(value) / longest if math.isfinite(value) else 0.0
                    rows[method].append(Entry(_format(value, meaning), share, value == best))
            if any(entry.share for entries in rows.values() for entry in entries):
                columns = [f"x{factor:g}" for factor in setup.factors]
                unit = unit_of(meaning, setup)
                found.append(Table(metric, meaning, unit, degradation, columns, list(rows.items())))
    return found


def summary(cells: Sequence[Mean], setup: Setup) -> dict[str, Any]:
    """Return what machines are told on stdout: the setup and the means, with None for what is not defined."""
    return {
        "protocol": setup.protocol,
        "unit": setup.unit,
        "crop_border": setup.border,
        "means": [
            {
                "degradation": cell.degradation,
                "factor": cell.factor,
                "method": cell.method,
                "images": cell.images,
                "seconds": cell.seconds,
                **_finite(cell.figures),
            }
            for cell in cells
        ],
    }


def to_json(records: Sequence[Record], setup: Setup, details: dict[str, Any]) -> bytes:
    """Encode everything: the summary, what the measures mean, and every image's figures.

    Args:
        records: Of the run.
        setup: What was measured.
        details: Further facts: data set, version, networks.
    """
    content = {
        **details,
        **summary(means(records), setup),
        "description": PROTOCOLS[setup.protocol].description,
        "metrics": {
            name: {
                "label": metric.label,
                "unit": setup.unit if metric.unit == "depth" else metric.unit,
                "better": metric.better,
                "description": metric.description,
            }
            for name, metric in describe_measures(setup.thresholds).items()
        },
        "images": [
            {
                "image": record.image,
                "degradation": record.degradation,
                "factor": record.factor,
                "method": record.method,
                **_finite(record.figures),
            }
            for record in records
        ],
    }
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def images_csv(records: Sequence[Record], setup: Setup) -> bytes:
    """Encode one line per image, degradation, factor and method."""
    head = ["image", "degradation", "factor", "method", *describe_measures(setup.thresholds)]
    rows = ([r.image, r.degradation, f"{r.factor:g}", r.method, *r.figures.values()] for r in records)
    return csv_bytes([head, *rows])


def means_csv(records: Sequence[Record], setup: Setup) -> bytes:
    """Encode one line per degradation, factor and method: means over images."""
    head = ["degradation", "factor", "method", "images", *describe_measures(setup.thresholds)]
    rows = ([c.degradation, f"{c.factor:g}", c.method, c.images, *c.figures.values()] for c in means(records))
    return csv_bytes([head, *rows])


def _finite(figures: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}
