"""Small plots as numbers that the templates turn into SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH = 240.0
HEIGHT = 56.0
_GAP = 1.5


@dataclass(frozen=True)
class Bar:
    """A rectangle of a plot ``WIDTH`` by ``HEIGHT``.

    Attributes:
        x: Left side.
        y: Upper side.
        width: To the right.
        height: Downwards.
        title: What it stands for.
    """

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Histogram:
    """How values are distributed.

    Attributes:
        bars: One per class that is not empty.
        mean: Place of the mean.
        low: Left end of the axis.
        high: Right end of the axis.
        zero: Place of 0, if it is on the axis.
        tallest: Number of values in the fullest class.
    """

    bars: list[Bar]
    mean: float
    low: float
    high: float
    zero: float | None
    tallest: int


def histogram(values: Sequence[float], *, classes: int = 24, with_zero: bool = False) -> Histogram | None:
    """Return the histogram of two or more different values, else None.

    Args:
        values: Finite numbers.
        classes: Most classes there are.
        with_zero: Whether the axis reaches to 0 although no value does: for differences, which side of it they are
            on is the first thing to see.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.size < 2 or not numbers.max() > numbers.min():
        return None
    # Few values in many classes say nothing.
    count = int(np.clip(np.ceil(2 * numbers.size ** (1 / 2)), 5, classes))
    low, high = float(numbers.min()), float(numbers.max())
    if with_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    counts, edges = np.histogram(numbers, bins=count, range=(low, high))
    step = WIDTH / count
    bars = []
    for index, number in enumerate(counts.tolist()):
        if number:
            tall = max(HEIGHT * number / counts.max(), 2.0)
            title = f"{number} of {numbers.size}: {edges[index]:.4g} to {edges[index + 1]:.4g}"
            bars.append(Bar(index * step + _GAP / 2, HEIGHT - tall, step - _GAP, tall, title))

    def place(value: float) -> float:
        return WIDTH * (value - low) / (high - low)

    zero = place(0.0) if with_zero or low < 0 < high else None
    return Histogram(bars, place(float(numbers.mean())), low, high, zero, int(counts.max()))


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval on an axis with 0 in the middle.

    Attributes:
        mean: Place of the mean.
        low: Place of the lower end.
        high: Place of the upper end.
    """

    mean: float
    low: float
    high: float


def interval(mean: float, low: float, high: float, *, reach: float) -> Interval:
    """Return places on an axis from ``-reach`` to ``reach``; what is beyond its ends stands at them."""
    return Interval(*(float(np.clip(WIDTH * (value / reach + 1) / 2, 0, WIDTH)) for value in (mean, low, high)))
