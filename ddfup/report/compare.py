"""Two reports on the same images against each other: paired differences and what they are worth."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddfup import writing
from ddfup.errors import InputError, OutputError, PairingError
from ddfup.metrics import Metric
from ddfup.report.page import render_comparison
from ddfup.report.results import Report
from ddfup.tables import csv_bytes, printable

COMPARISON_FILES = ("compare.html", "compare.json", "compare.csv")
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Line:
    """One measure, over the images for which both reports have it.

    Attributes:
        meaning: The measure.
        images: How many images.
        mean_a: Mean of A.
        mean_b: Mean of B.
        difference: Mean of B - A.
        low: Lower end of the 95 % confidence interval of the mean difference (Student's t); NaN for one image.
        high: Its upper end.
        wins: Images for which B is better.
        losses: Images for which A is better.
        ties: Images for which both are equal.
        differences: Image -> B - A.
    """

    meaning: Metric
    images: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int
    differences: dict[str, float]

    @property
    def better(self) -> str:
        """``A`` or ``B`` if the confidence interval leaves 0 out, else nothing."""
        if self.low > 0 or self.high < 0:
            return "B" if (self.difference < 0) == (self.meaning.better == "lower") else "A"
        return ""


@dataclass(frozen=True)
class Comparison:
    """Report B against report A.

    Attributes:
        name_a: What A is called.
        name_b: What B is called.
        unit: ``m``, or nothing for disparity.
        images: Names of the images in both.
        lines: Measure -> result.
        notes: What to know about it, one sentence each.
    """

    name_a: str
    name_b: str
    unit: str
    images: list[str]
    lines: dict[str, Line]
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return the comparison as JSON knows it."""
        metrics = {}
        for name, line in self.lines.items():
            fields = {key: value for key, value in vars(line).items() if key not in ("meaning", "differences")}
            fields = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in fields.items()
            }
            metrics[name] = fields | {"better": line.better or None, "differences": line.differences}
        return {
            "format": "ddfup-comparison",
            "version": 1,
            "a": self.name_a,
            "b": self.name_b,
            "unit": self.unit,
            "confidence": _CONFIDENCE,
            "images": len(self.images),
            "notes": self.notes,
            "metrics": metrics,
        }


def compare(a: Report, b: Report, *, name_a: str, name_b: str) -> Comparison:
    """Compare two reports image by image.

    Args:
        a: Report to compare with.
        b: Report to judge.
        name_a: What to call ``a``.
        name_b: What to call ``b``.

    Raises:
        InputError: If their units differ or they have no measure in common.
        PairingError: If they have no image in common.
    """
    if a.unit != b.unit:
        raise InputError(f"{name_a} and {name_b} must have one unit; got {a.unit!r} and {b.unit!r}")
    ours, theirs = ({row.name for row in report.good} for report in (a, b))
    images = sorted(ours & theirs)
    if not images:
        raise PairingError(
            f"{name_a} ({len(ours)} images) and {name_b} ({len(theirs)} images) have no image name in common"
        )
    names = [name for name, meaning in a.metrics.items() if b.metrics.get(name) == meaning]
    if not names:
        raise InputError(f"{name_a} and {name_b} have no measure in common", "make both reports anew")
    notes = []
    for name, alone in ((name_a, ours - theirs), (name_b, theirs - ours)):
        if alone:
            notes.append(f"{len(alone)} images that only {name} has are left out")
    if set(names) != set(a.metrics) | set(b.metrics):
        notes.append("measures that not both have, with one definition, are left out")
    for key in sorted((a.settings.keys() | b.settings.keys()) - {"thresholds", "unit", "truth_unit"}):
        one, two = a.settings.get(key), b.settings.get(key)
        if one != two:
            notes.append(f"the reports were made with different {key}: {one} and {two}")
    lines = {}
    for name in names:
        one, two = a.values(name), b.values(name)
        both = [image for image in images if image in one and image in two]
        if both:
            lines[name] = _line(a.metrics[name], [one[i] for i in both], [two[i] for i in both], both)
    return Comparison(name_a, name_b, a.unit, images, lines, notes)


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Write compare.html, compare.json and compare.csv into a folder, made if it does not exist.

    Raises:
        OutputError: If they cannot be written.
    """
    names = list(comparison.lines)
    table: list[Sequence[object]] = [["name", *(f"{name} B-A" for name in names)]]
    for image in comparison.images:
        values = (comparison.lines[name].differences.get(image) for name in names)
        table.append([image, *values])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: must be a writable folder; got {error.strerror or error}") from error
    files = {
        "compare.html": render_comparison(comparison),
        "compare.json": (json.dumps(comparison.record(), indent=1, allow_nan=False) + "\n").encode(),
        "compare.csv": csv_bytes(table),
    }
    writing.write_files({out / name: data for name, data in files.items()})


def labels(a: Path, b: Path) -> tuple[str, str]:
    """Return short names for two reports: their folders' names, or whole paths if these are the same."""
    places = [path.parent if path.name == "metrics.json" else path for path in (a, b)]
    short = [place.resolve().name or str(place) for place in places]
    one, two = short if short[0] != short[1] else [str(place) for place in places]
    return printable(one), printable(two)


@functools.cache
def student_quantile(degrees: int, *, confidence: float = _CONFIDENCE) -> float:
    """Return t such that a share ``confidence`` of Student's distribution lies between -t and t.

    Args:
        degrees: Degrees of freedom, 1 or more.
        confidence: Above 0, below 1.
    """
    low, high = 0.0, 1e6
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_share(middle, degrees) < confidence else (low, middle)
    return low


def _student_share(t: float, degrees: int) -> float:
    """Return the probability between -t and t: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def _line(meaning: Metric, a: list[float], b: list[float], images: list[str]) -> Line:
    gaps = [two - one for one, two in zip(a, b, strict=True)]
    count = len(gaps)
    mean = math.fsum(gaps) / count
    half = math.nan
    if count > 1:
        deviation = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / (count - 1))
        half = student_quantile(count - 1) * deviation / math.sqrt(count)
    lower = sum(gap < 0 for gap in gaps)
    higher = sum(gap > 0 for gap in gaps)
    wins, losses = (lower, higher) if meaning.better == "lower" else (higher, lower)
    return Line(
        meaning=meaning,
        images=count,
        mean_a=math.fsum(a) / count,
        mean_b=math.fsum(b) / count,
        difference=mean,
        low=mean - half,
        high=mean + half,
        wins=wins,
        losses=losses,
        ties=count - lower - higher,
        differences=dict(zip(images, gaps, strict=True)),
    )
