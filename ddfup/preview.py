"""Pictures of depth for people to look at: panels side by side under one colour scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

_SMALLEST_PANEL = 160
_LARGEST_PANEL = 960
_SINGLE_PANEL = 800
_BACKGROUND = (24, 25, 28)
_TEXT = (226, 226, 230)
_INVALID = (88, 90, 96)


@dataclass(frozen=True)
class Scale:
    """Values to colours.

    Attributes:
        low: Value of the first colour.
        high: Value of the last colour.
        colours: (256, 3) RGB.
        label: Unit of the values.
    """

    low: float
    high: float
    colours: Picture
    label: str

    def paint(self, values: NDArray[np.floating[Any]]) -> Picture:
        """Return (H, W, 3) colours of (H, W) values; grey where not finite."""
        finite = np.isfinite(values)
        steps = (np.where(finite, values, self.low) - self.low) * (255 / (self.high - self.low))
        painted = self.colours[np.clip(np.rint(steps), 0, 255).astype(np.uint8)]
        painted[~finite] = _INVALID
        return painted


def depth_scale(*maps: NDArray[np.floating[Any]], label: str) -> Scale:
    """Return one scale for several depth maps: 2nd to 98th percentile of all of them, near = bright.

    Args:
        maps: Depth in metres or disparity; not finite = invalid.
        label: Unit; for anything but metres, large = bright.
    """
    import cv2

    # Each map counts the same however many pixels it has.
    ends = [np.percentile(kept, (2, 98)) for kept in (each[np.isfinite(each)] for each in maps) if kept.size]
    low = float(min(end[0] for end in ends)) if ends else 0.0
    high = float(max(end[1] for end in ends)) if ends else 1.0
    if not high > low:
        margin = max(abs(low) * 0.05, 1e-3)
        low, high = low - margin, high + margin
    colours = _colours(cv2.COLORMAP_INFERNO)
    # The darkest colours look alike on a screen, and like the background.
    colours = colours[np.linspace(28, 250, 256).astype(np.uint8)]
    return Scale(low, high, colours[::-1] if label == "m" else colours, label)


def side_by_side(
    guide: NDArray[Any], low: NDArray[np.floating[Any]], result: NDArray[np.floating[Any]], *, label: str
) -> Picture:
    """Draw guide, input depth (enlarged without smoothing) and result.

    Args:
        guide: (H, W, 3) uint8 or uint16.
        low: (h, w) input depth; not finite or 0 = invalid.
        result: (H, W) depth; not finite = invalid.
        label: Unit written at the colour bar.

    Returns:
        RGB picture of three panels and a colour bar.
    """
    given = np.where(np.isfinite(low) & (low != 0), low, np.nan)
    scale = depth_scale(given, result, label=label)
    height, width = result.shape
    ratio = width / low.shape[1]
    size = _panel_size(width, height)
    shown = guide if guide.dtype == np.uint8 else (guide >> 8).astype(np.uint8)
    panels = {
        "guide": _fit(shown, size),
        f"input {low.shape[1]} x {low.shape[0]}": _enlarge(scale.paint(given), size),
        f"result {width} x {height} (x{ratio:.3g})": _fit(scale.paint(result), size),
    }
    return _compose(panels, scale)


def alone(depth: NDArray[np.floating[Any]], *, label: str) -> Picture:
    """Draw one depth map, its pixels as they are.

    Args:
        depth: (H, W); not finite = invalid.
        label: Unit written at the colour bar.

    Returns:
        RGB picture of one panel and a colour bar.
    """
    height, width = depth.shape
    scale = depth_scale(depth, label=label)
    # Small maps as whole blocks, so that all pixels look alike.
    factor = max(1, _SINGLE_PANEL // max(width, height))
    painted = scale.paint(depth).repeat(factor, axis=0).repeat(factor, axis=1)
    panel = _fit(painted, _panel_size(width * factor, height * factor))
    return _compose({f"{width} x {height}": panel}, scale)


def errors(
    truth: NDArray[np.floating[Any]], predictions: Mapping[str, NDArray[np.floating[Any]]], *, label: str
) -> Picture:
    """Draw absolute errors of several results under one scale, from 0 to the first one's 98th percentile.

    Args:
        truth: (H, W) depth; not finite or 0 = none.
        predictions: Name of each result and its (H, W) depth.
        label: Unit of the depths, written at the colour bar.
    """
    known = np.where(np.isfinite(truth) & (truth != 0), truth, np.nan)
    gaps = {name: np.abs(depth - known) for name, depth in predictions.items()}
    scale = error_scale(next(iter(gaps.values())), label=label)
    size = _panel_size(truth.shape[1], truth.shape[0])
    return _compose({f"error of {name}": _fit(scale.paint(gap), size) for name, gap in gaps.items()}, scale)


def error_scale(gap: NDArray[np.floating[Any]], *, label: str) -> Scale:
    """Return a scale for absolute errors, from 0 to their 98th percentile.

    Args:
        gap: Absolute errors; not finite = none.
        label: Their unit.
    """
    import cv2

    kept = gap[np.isfinite(gap)]
    high = float(np.percentile(kept, 98)) if kept.size else 1.0
    return Scale(0.0, max(high, 1e-6), _colours(cv2.COLORMAP_VIRIDIS), label)


def _colours(colormap: int) -> Picture:
    import cv2

    table = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], colormap)[:, 0, ::-1]
    return np.ascontiguousarray(table, np.uint8)


def _panel_size(width: int, height: int) -> tuple[int, int]:
    """Return (width, height) of a panel: the picture's own, its longer side kept within 160 to 960."""
    longer = max(width, height)
    factor = min(max(longer, _SMALLEST_PANEL), _LARGEST_PANEL) / longer
    return max(round(width * factor), 1), max(round(height * factor), 1)


def _fit(picture: Picture, size: tuple[int, int]) -> Picture:
    import cv2

    if (picture.shape[1], picture.shape[0]) == size:
        return picture
    larger = size[0] > picture.shape[1]
    fitted = cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST if larger else cv2.INTER_AREA)
    return np.asarray(fitted, np.uint8)


def _enlarge(picture: Picture, size: tuple[int, int]) -> Picture:
    """Resize so that every input pixel stays a sharp block."""
    rows, columns = (
        np.minimum((np.arange(large) + 0.5) * small / large, small - 1).astype(np.intp)
        for small, large in zip(picture.shape[:2], size[::-1], strict=True)
    )
    return picture[np.ix_(rows, columns)]


def _compose(panels: Mapping[str, Picture], scale: Scale) -> Picture:
    """Put panels in a row, a caption under each, and the colour bar at the right."""
    from PIL import Image, ImageDraw, ImageFont

    first = next(iter(panels.values()))
    height, width = first.shape[:2]
    text = float(np.clip(width / 34, 11, 22))
    font = ImageFont.load_default(size=text)
    gap, line, bar = round(text * 0.7), round(text * 2), round(text * 1.1)
    numbers = _ticks(scale)
    room = max(font.getlength(label) for _, label in numbers) + gap
    across = gap + len(panels) * (width + gap) + bar + gap // 2 + round(room)
    canvas = Image.new("RGB", (across, height + gap + line), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    x = gap
    for caption, panel in panels.items():
        canvas.paste(Image.fromarray(panel), (x, gap))
        while font.getlength(caption) > width and len(caption) > 1:
            caption = caption[:-1]
        draw.text((x + width / 2, gap + height + line / 2), caption, fill=_TEXT, font=font, anchor="mm")
        x += width + gap
    # The bar runs from the lowest value at the bottom to the highest at the top.
    column = scale.colours[np.linspace(255, 0, height).round().astype(np.uint8)]
    canvas.paste(Image.fromarray(np.repeat(column[:, None], bar, axis=1)), (x, gap))
    for share, label in numbers:
        y = gap + (1 - share) * (height - 1)
        draw.line((x + bar, y, x + bar + gap // 3, y), fill=_TEXT)
        y = min(max(y, gap + text / 2), gap + height - text / 2)
        draw.text((x + bar + gap // 2, y), label, fill=_TEXT, font=font, anchor="lm")
    if scale.label:
        draw.text((x + bar / 2, gap + height + line / 2), scale.label, fill=_TEXT, font=font, anchor="mm")
    return np.array(canvas)


def _ticks(scale: Scale) -> list[tuple[float, str]]:
    """Return three to six round values as (share of the bar, text)."""
    span = scale.high - scale.low
    step = 10 ** np.floor(np.log10(span))
    while span / step < 3:
        step /= 2 if span / step >= 1.5 else 5
    digits = max(0, -int(np.floor(np.log10(step) + 1e-9)))
    values = np.arange(np.ceil(scale.low / step), np.floor(scale.high / step) + 1) * step
    while len(values) > 6:
        values = values[::2]
    if np.any(np.abs(np.round(values, digits) - values) > 1e-6 * span):
        digits += 1
    return [(float((value - scale.low) / span), f"{value:.{digits}f}") for value in values]
