"""What the trials of promises share: how much is tried, and the lines that come out."""

import os
from dataclasses import dataclass, field

from torture.batches import CHECKOUT


@dataclass(frozen=True)
class Counts:
    """How much is tried; as they are here: the promises' own figures."""

    kills: int = 200
    signals: int = 100
    inputs: int = 100_000
    good: int = 200
    changes: int = 100
    rows: int = 5000
    values: int = 2000
    starts: int = 20
    processes: int = 8
    seed: int = 0


SHORT = Counts(kills=3, signals=2, inputs=400, good=20, changes=12, rows=150, values=64, starts=3, processes=2)


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        promise: ``P1`` and so on.
        done: What was done.
        figure: What came out.
        passed: Whether that is as promised; None: it is owed, for the reason in ``figure``.
        details: What went wrong, one each.
    """

    promise: str
    done: str
    figure: str
    passed: bool | None
    details: list[str] = field(default_factory=list)


def verdict(promise, done, figure, faults):
    """Return the line of a trial that is as promised if it found no fault."""
    return Line(promise, done, figure, not faults, faults)


def environment(**more):
    """Return the environment of a command from this checkout."""
    return {**os.environ, "PYTHONPATH": str(CHECKOUT), **more}
