"""The figures of a report as data: metrics.json, read and written, and metrics.csv."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ddfup.errors import InputError
from ddfup.metrics import Metric
from ddfup.tables import csv_bytes

_FORMAT = "ddfup-metrics"
_VERSION = 1


@dataclass(frozen=True)
class Row:
    """One image.

    Attributes:
        name: Relative stem.
        prediction: File that was judged.
        truth: File it was judged by.
        status: ``ok`` or ``failed``.
        error: Why it failed.
        width: Columns.
        height: Rows.
        figures: Name of each measure and its value; NaN or infinite where not defined.
    """

    name: str
    prediction: str
    truth: str
    status: str
    error: str | None = None
    width: int | None = None
    height: int | None = None
    figures: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return the row as JSON knows it: ``metrics`` holds None where not defined."""
        fields = asdict(self)
        figures = fields.pop("figures")
        return fields | {"metrics": {name: _json_number(value) for name, value in figures.items()}}


@dataclass(frozen=True)
class Report:
    """All that was measured.

    Attributes:
        prediction: What was judged, as the user named it.
        truth: What it was judged by.
        unit: ``m``, or nothing for disparity.
        settings: What else decides the figures: borders, limits, thresholds, units.
        metrics: What the measures mean.
        rows: The images, by name.
    """

    prediction: str
    truth: str
    unit: str
    settings: dict[str, Any]
    metrics: dict[str, Metric]
    rows: list[Row]

    @property
    def good(self) -> list[Row]:
        """The images that have figures."""
        return [row for row in self.rows if row.status == "ok"]

    @property
    def bad(self) -> list[Row]:
        """The images that failed."""
        return [row for row in self.rows if row.status != "ok"]

    def values(self, name: str) -> dict[str, float]:
        """Return image -> finite value of one measure."""
        found = {row.name: row.figures.get(name, math.nan) for row in self.good}
        return {image: value for image, value in found.items() if math.isfinite(value)}


def summarise(report: Report) -> dict[str, dict[str, Any]]:
    """Return mean, median and spread of each measure over the images where it is defined.

    Returns:
        Measure -> ``images`` (how many), ``mean``, ``median``, ``std``, ``p5``, ``p95``, ``best``, ``worst`` and the
        ``worst_image``; the numbers are NaN without images.
    """
    table = {}
    for name, meaning in report.metrics.items():
        values = report.values(name)
        numbers = np.array(list(values.values()), np.float64)
        entry: dict[str, Any] = {"images": len(values)}
        if values:
            low, median, high = np.percentile(numbers, (5, 50, 95)).tolist()
            sign = 1 if meaning.better == "lower" else -1
            worst = max(values, key=lambda image: sign * values[image])
            best = min(values, key=lambda image: sign * values[image])
            entry |= {"mean": math.fsum(numbers) / len(numbers), "median": median, "std": float(numbers.std())}
            entry |= {"p5": low, "p95": high, "best": values[best], "worst": values[worst], "worst_image": worst}
        else:
            entry |= dict.fromkeys(("mean", "median", "std", "p5", "p95", "best", "worst"), math.nan)
            entry["worst_image"] = None
        table[name] = entry
    return table


def encode_json(report: Report) -> bytes:
    """Return metrics.json. Values that are not defined (or infinite: PSNR of a perfect result) are null."""
    summary = {
        name: {key: _json_number(value) if isinstance(value, float) else value for key, value in entry.items()}
        for name, entry in summarise(report).items()
    }
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "prediction": report.prediction,
        "truth": report.truth,
        "unit": report.unit,
        "settings": report.settings,
        "metrics": {name: asdict(meaning) for name, meaning in report.metrics.items()},
        "summary": summary,
        "images": [row.record() for row in report.rows],
    }
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def encode_csv(report: Report) -> bytes:
    """Return metrics.csv: one line per image; empty cells where not defined."""
    names = list(report.metrics)
    lines: list[Sequence[object]] = [["name", "status", "error", "width", "height", *names]]
    for row in report.rows:
        figures = (row.figures.get(name) for name in names)
        lines.append([row.name, row.status, row.error, row.width, row.height, *figures])
    return csv_bytes(lines)


def read_report(path: Path) -> Report:
    """Read metrics.json, or the one in a folder.

    Raises:
        InputError: If the file is missing or something else.
    """
    file = path / "metrics.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{file}: must be the metrics.json of a report; got {reason}", _REPORT_HINT) from error
    try:
        if content["format"] != _FORMAT or content["version"] != _VERSION:
            raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
        return Report(
            prediction=str(content["prediction"]),
            truth=str(content["truth"]),
            unit=str(content["unit"]),
            settings=dict(content["settings"]),
            metrics={str(name): _metric(meaning) for name, meaning in content["metrics"].items()},
            rows=[_row(entry) for entry in content["images"]],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{file}: must be the metrics.json of a report; got {reason}", _REPORT_HINT) from error


_REPORT_HINT = "make one with: ddfup report PRED GT -o OUT_DIR"


def _metric(meaning: Mapping[str, Any]) -> Metric:
    unit, better = meaning["unit"], meaning["better"]
    if unit not in ("depth", "share", "dB", "number") or better not in ("lower", "higher"):
        raise ValueError(f"unit {unit!r}, better {better!r}")
    return Metric(unit, better, str(meaning["label"]), str(meaning["description"]))


def _row(entry: Mapping[str, Any]) -> Row:
    return Row(
        name=str(entry["name"]),
        prediction=str(entry["prediction"]),
        truth=str(entry["truth"]),
        status=str(entry["status"]),
        error=entry["error"],
        width=entry["width"],
        height=entry["height"],
        figures={str(name): math.nan if value is None else float(value) for name, value in entry["metrics"].items()},
    )


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None
