"""How methods are compared: the field's protocols as data, and what all of them share.

Shared by all: images are cut at their lower and right ends to a multiple of a whole factor; depth is normalised
by each method itself, from the low resolution alone (never by the range of the ground truth); every measure is
taken per image and averaged over images; errors are in centimetres, or for disparity in its own levels.
The field's grey-level sets (Middlebury, Lu) have no holes: 0 is a level there, which
``--unit disparity --invalid nan`` says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ddfup.degrade import DEGRADATIONS
from ddfup.errors import ArgumentError
from ddfup.metrics import Thresholds


@dataclass(frozen=True)
class Protocol:
    """What is degraded how, and which pixels count.

    Attributes:
        name: For ``--protocol``.
        description: One sentence.
        degradations: Rows of ``ddfup.degrade.DEGRADATIONS``.
        factors: High-resolution over low-resolution lengths.
        border: Pixels that do not count along each side, for metric depth.
        border_disparity: The same for disparity: the field crops NYU, not Middlebury and Lu.
    """

    name: str
    description: str
    degradations: tuple[str, ...]
    factors: tuple[float, ...]
    border: int
    border_disparity: int


PROTOCOLS: dict[str, Protocol] = {
    row.name: row
    for row in (
        Protocol(
            "point",
            "Point-sampled depth[(s-1)//2::s], as in the PAC-Net and DDF-Up papers; border of 6 not counted.",
            ("nearest",),
            (4.0, 8.0, 16.0),
            6,
            6,
        ),
        Protocol(
            "bicubic",
            "Antialiased bicubic (Pillow), as in the DKN family of papers; border of 6 not counted, disparity whole.",
            ("bicubic",),
            (4.0, 8.0, 16.0),
            6,
            0,
        ),
        Protocol(
            "robust",
            "One model for every degradation and ratio, whole and not; counted as in bicubic.",
            ("nearest", "bicubic", "area", "sensor"),
            (2.0, 4.0, 7.5, 8.0, 16.0, 32.0),
            6,
            0,
        ),
        Protocol(
            "holes",
            "Area means with a fifth to a third missing: how holes are filled; counted as in bicubic.",
            ("holes",),
            (4.0, 8.0, 16.0),
            6,
            0,
        ),
        Protocol("custom", "As the options say; all pixels count.", ("bicubic",), (4.0, 8.0, 16.0), 0, 0),
    )
}


@dataclass(frozen=True)
class Setup:
    """A protocol made concrete for one data set.

    Attributes:
        protocol: Its name.
        degradations: Rows of ``ddfup.degrade.DEGRADATIONS``.
        factors: High-resolution over low-resolution lengths.
        border: Pixels that do not count along each side.
        unit: Of depth errors: ``cm`` or ``levels``.
    """

    protocol: str
    degradations: tuple[str, ...]
    factors: tuple[float, ...]
    border: int
    unit: str

    @property
    def scale(self) -> float:
        """Reported unit over the unit of depth in memory (metres or levels)."""
        return 100.0 if self.unit == "cm" else 1.0

    @property
    def thresholds(self) -> Thresholds:
        """Lines of the bad-pixel measures."""
        return Thresholds() if self.unit == "cm" else Thresholds(bad=(1.0, 3.0), unit="")


def setup(
    protocol: str | None = None,
    *,
    disparity: bool = False,
    degradations: Sequence[str] = (),
    factors: Sequence[float] = (),
    border: int | None = None,
) -> Setup:
    """Put a protocol and the user's changes together.

    Args:
        protocol: Row of `PROTOCOLS`; None: "custom" if degradations or a border are given, else "bicubic".
        disparity: Whether depths are levels of disparity rather than metres.
        degradations: In the place of the protocol's; only "custom" and "robust" leave the choice.
        factors: In the place of the protocol's.
        border: In the place of the protocol's; only "custom" leaves the choice.

    Raises:
        ArgumentError: If a value is unknown, or a fixed part of the protocol would change.

    Example:
        >>> setup("bicubic", factors=[8]).border
        6
    """
    name = protocol or ("custom" if degradations or border is not None else "bicubic")
    if name not in PROTOCOLS:
        raise ArgumentError(f"--protocol must be one of {', '.join(PROTOCOLS)}; got {name!r}")
    row = PROTOCOLS[name]
    for kind in degradations:
        if kind not in DEGRADATIONS:
            raise ArgumentError(f"--degradation must be one of {', '.join(DEGRADATIONS)}; got {kind!r}")
    if degradations and name in ("point", "bicubic") and set(degradations) != set(row.degradations):
        raise ArgumentError(
            f"--degradation of the protocol {name} must be {row.degradations[0]}; got {', '.join(degradations)}",
            "--protocol custom leaves the choice",
        )
    fixed = row.border_disparity if disparity else row.border
    if border is not None and name != "custom" and border != fixed:
        raise ArgumentError(
            f"--crop-border of the protocol {name} must be {fixed} here; got {border}",
            "--protocol custom leaves the choice",
        )
    for factor in factors:
        if not (math.isfinite(factor) and factor >= 1):
            raise ArgumentError(f"--factor must be at least 1; got {factor:g}")
    chosen = replace(
        row,
        degradations=tuple(dict.fromkeys(degradations)) or row.degradations,
        factors=tuple(dict.fromkeys(float(factor) for factor in factors)) or row.factors,
    )
    return Setup(
        name,
        chosen.degradations,
        chosen.factors,
        fixed if border is None else border,
        "levels" if disparity else "cm",
    )
