"""The pages: numbers as people read them, and the templates filled in. Nothing in a page is fetched from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddfup.metrics import Metric
from ddfup.preview import depth_scale, error_scale
from ddfup.report import charts
from ddfup.report.pictures import Pictures, Shown, stops
from ddfup.report.results import Report, Row, summarise
from ddfup.tables import printable

if TYPE_CHECKING:
    from ddfup.report.compare import Comparison

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_HEADLINES = ("rmse", "mae", "abs_rel", "delta1", "edge_rmse", "ssim")


@dataclass(frozen=True)
class Card:
    """One image on the page.

    Attributes:
        row: Its figures.
        pictures: Its pictures.
        links: Kind of picture -> address of the full one, relative to the page.
    """

    row: Row
    pictures: Pictures
    links: dict[str, str]


@dataclass(frozen=True)
class Style:
    """How the numbers of a measure are written.

    Attributes:
        factor: What they are multiplied by.
        unit: What stands behind them; may be empty.
        digits: Decimals.
    """

    factor: float
    unit: str
    digits: int

    def plain(self, value: float) -> str:
        """Return the number without its unit, in ASCII."""
        if not math.isfinite(value):
            return "-" if math.isnan(value) else str(value)
        text = f"{value * self.factor:.{self.digits}f}"
        return text if float(text) else text.lstrip("-")

    def number(self, value: float) -> str:
        """Return the number without its unit, as a page shows it."""
        if math.isnan(value):
            return "\N{EN DASH}"
        return self.plain(value).replace("-", "\N{MINUS SIGN}").replace("inf", "\N{INFINITY}")

    def shows(self, value: float) -> bool:
        """Tell whether anything but zeros is left of a number at these decimals."""
        return bool(float(f"{value * self.factor:.{self.digits}f}"))

    def text(self, value: float) -> str:
        """Return the number with its unit."""
        space = "\u202f" if self.unit else ""
        return f"{self.number(value)}{space}{self.unit}" if math.isfinite(value) else self.number(value)


def style_of(meaning: Metric, unit: str, typical: float) -> Style:
    """Return how to write a measure.

    Args:
        meaning: The measure.
        unit: ``m``, or nothing for disparity.
        typical: A usual value; decides between metres and millimetres, and the decimals.
    """
    if meaning.unit == "share":
        return Style(100, "%", 2 if min(abs(typical), abs(1 - typical)) < 0.03 else 1)
    if meaning.unit == "dB":
        return Style(1, "dB", 2)
    if meaning.unit == "number":
        return Style(1, "", 4)
    size = abs(typical) if math.isfinite(typical) else 1.0
    if unit == "m" and size < 1:
        return Style(1000, "mm", 0 if size >= 0.1 else 1 if size >= 0.01 else 2)
    return Style(1, unit, 3 if size < 10 else 2 if size < 100 else 1)


def styles(report: Report) -> dict[str, Style]:
    """Return how each measure of a report is written; one measure is written in one way everywhere."""
    return {
        name: style_of(report.metrics[name], report.unit, entry["mean"]) for name, entry in summarise(report).items()
    }


def render_report(report: Report, cards: Sequence[Card]) -> bytes:
    """Return report.html.

    Args:
        report: The figures.
        cards: The images to show.
    """
    summary, written = summarise(report), styles(report)
    order = {name: index for index, name in enumerate(_worst_first(report))}
    ordered = sorted(cards, key=lambda card: order[card.row.name])
    numbers = {card.row.name: index for index, card in enumerate(ordered)}
    tiles = []
    for name, meaning in report.metrics.items():
        values = list(report.values(name).values())
        entry, style = summary[name], written[name]
        plot = charts.histogram(values)
        tiles.append(
            {
                "name": name,
                "meaning": meaning,
                "style": style,
                "entry": entry,
                "plot": plot,
                "spoken": _spoken(meaning, style, entry) if plot else "",
                "ends": _ends(style, plot.low, plot.high) if plot else (),
            }
        )
    return _render(
        "report.html",
        label=report.unit,
        report=report,
        settings=_settings(report),
        tiles=tiles,
        written=written,
        rows=sorted(report.good, key=lambda row: numbers[row.name]),
        numbers=numbers,
        cards=[_card(card, report, written) for card in ordered],
        failed=report.bad,
    )


def comparison_styles(comparison: Comparison) -> dict[str, Style]:
    """Return how each measure of a comparison is written."""
    return {
        name: style_of(line.meaning, comparison.unit, max(abs(line.mean_a), abs(line.mean_b)))
        for name, line in comparison.lines.items()
    }


def render_comparison(comparison: Comparison) -> bytes:
    """Return compare.html."""
    written = comparison_styles(comparison)
    plots = {}
    for name, line in comparison.lines.items():
        reach = max(abs(value) for value in (line.difference, line.low, line.high) if math.isfinite(value)) or 1.0
        placed = charts.interval(line.difference, line.low, line.high, reach=reach * 1.15) if line.images > 1 else None
        plots[name] = (placed, charts.histogram(list(line.differences.values()), with_zero=True))
    first = comparison.lines.get("rmse") or next(iter(comparison.lines.values()))
    sign = 1 if first.meaning.better == "lower" else -1
    images = sorted(comparison.images, key=lambda image: -sign * first.differences.get(image, -sign * math.inf))
    return _render("compare.html", comparison=comparison, written=written, plots=plots, images=images, first=first)


def render_benchmark(*, dataset: str, lead: str, tables: Sequence[Any], facts: Sequence[tuple[str, str]]) -> bytes:
    """Make the page of a benchmark.

    Args:
        dataset: Its name.
        lead: One sentence on what was done.
        tables: Of ``ddfup.benchmark.results.page_tables``.
        facts: Label and value of what else is to be known.
    """
    names = list(dict.fromkeys(table.metric for table in tables))
    groups = [[table for table in tables if table.metric == name] for name in names]
    return _render("benchmark.html", dataset=dataset, lead=lead, groups=groups, facts=facts)


def render_batch(
    records: Sequence[Mapping[str, Any]], *, title: str, seconds: float, previews: Mapping[str, str]
) -> bytes:
    """Return batch.html; the arguments are those of `ddfup.report.batch.batch_report`."""
    made = [record for record in records if record["status"] == "ok"]
    failed = [record for record in records if record["status"] == "failed"]
    tiles = [
        ("Written", len(made), ""),
        ("Already done", sum(record["status"] == "skipped" for record in records), ""),
        ("Failed", len(failed), ""),
        ("Time", f"{seconds:.1f}", "s"),
        ("Rate", f"{len(made) / seconds:.2g}" if made and seconds > 0 else "\N{EN DASH}", "pairs/s"),
    ]
    shown = [(str(r["out"]), previews[str(r["out"])]) for r in records if str(r["out"]) in previews]
    styles = {"width": (1, 0), "height": (1, 0), "factor": (1, 2), "valid_fraction": (100, 1), "seconds": (1, 2)}
    rows = []
    for record in records:
        words = {"ok": ("written", 2), "skipped": ("already done", 1), "failed": ("failed", 0)}
        cells: list[tuple[str, Any]] = [words[str(record["status"])]]
        for key, (factor, digits) in styles.items():
            value = math.nan if record[key] is None else float(record[key])
            cells.append((Style(factor, "", digits).number(value), f"{value:.9g}"))
        rows.append({"out": str(record["out"]), "cells": cells})
    return _render("batch.html", title=title, records=records, failed=failed, tiles=tiles, pictures=shown, rows=rows)


def _worst_first(report: Report) -> list[str]:
    """Return the names of the images that have figures, the largest RMSE first."""
    return [row.name for row in sorted(report.good, key=lambda row: -row.figures.get("rmse", 0.0))]


def _spoken(meaning: Metric, style: Style, entry: dict[str, Any]) -> str:
    low, high = sorted((entry["best"], entry["worst"]))
    return (
        f"Histogram of {meaning.label} over {entry['images']} images: from {style.text(low)} to {style.text(high)}, "
        f"mean {style.text(entry['mean'])}, median {style.text(entry['median'])}"
    )


def _ends(style: Style, low: float, high: float) -> tuple[str, str]:
    """Return the ends of an axis, with as many decimals as it takes to tell them apart."""
    for digits in range(style.digits, style.digits + 6):
        finer = replace(style, digits=digits)
        if finer.number(low) != finer.number(high):
            return finer.number(low), finer.number(high)
    return style.number(low), style.number(high)


def _card(card: Card, report: Report, written: dict[str, Style]) -> dict[str, Any]:
    shown = card.pictures.shown
    pictures = {kind: _picture(shown[kind], card.links[kind]) for kind in shown}
    unit = f"\u202f{report.unit}".rstrip()
    low, high = card.pictures.depth
    digits = 2 if report.unit else 1
    error = style_of(report.metrics["rmse"], report.unit, card.pictures.error)
    return {
        "row": card.row,
        "pictures": pictures,
        # What the result is compared with by the slider.
        "left": "input" if "input" in shown else "truth",
        "depth": (f"{low:.{digits}f}{unit}", f"{high:.{digits}f}{unit}"),
        "error": error.text(card.pictures.error),
        "figures": [
            (report.metrics[name], written[name].text(card.row.figures[name]))
            for name in _HEADLINES
            if name in report.metrics
        ],
    }


def _picture(shown: Shown, link: str) -> dict[str, Any]:
    data = "data:image/webp;base64," + base64.b64encode(shown.thumbnail).decode() if shown.thumbnail else ""
    return {"src": data or link, "link": link, "width": shown.width, "height": shown.height, "lazy": not data}


def _settings(report: Report) -> list[tuple[str, str]]:
    """Return what decides the figures, in words."""
    chosen, lines = report.settings, report.settings["thresholds"]
    unit = "metres" if report.unit else "stored units (disparity)"
    texts = [
        ("Unit of depth", unit),
        (
            "Pixels counted",
            "true depth and prediction both measured" + (", inside the mask" if chosen.get("masks") else ""),
        ),
        ("Border left out", f"{chosen['crop_border']} px" if chosen["crop_border"] else "none"),
        (
            "Largest true depth",
            f"{chosen['max_depth']:g} {report.unit}".rstrip() if chosen["max_depth"] else "no limit",
        ),
        ("Depth edges", f"jumps above {lines['edge_jump'] * 100:g} %, {lines['edge_distance']} px around them"),
    ]
    return texts


def _render(template: str, *, label: str = "m", **values: Any) -> bytes:
    """Fill in a template; the page may run its own script and style, and load pictures, nothing else.

    Args:
        template: Its file.
        label: Unit of the depth, which decides what its colours mean.
        values: What the template asks for.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    flat = np.array([[0.0, 1.0]], np.float32)
    depth, error = depth_scale(flat, label=label), error_scale(flat, label=label)
    gradients = "".join(
        f".bar-{name}{{background:linear-gradient(to right,{','.join(stops(scale))})}}"
        for name, scale in (("depth", depth), ("error", error))
    )
    style = (_TEMPLATES / "style.css").read_text("utf-8") + gradients
    script = (_TEMPLATES / "page.js").read_text("utf-8")
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = printable
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data: 'self' file:; "
        f"style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    )
    html = environment.get_template(template).render(
        style=Markup(style),
        script=Markup(script),
        policy=policy,
        width=charts.WIDTH,
        height=charts.HEIGHT,
        **values,
    )
    return html.encode()


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
