"""The table of promises, and how one is tried."""

import traceback
from collections.abc import Callable

from torture import hostile, kills, places, refusals, stale, starts, values
from torture.table import Line

PROMISES: dict[str, tuple[str, Callable]] = {
    "P1": ("a file with its final name is whole; P3: a re-run equals one clean run", kills.p1),
    "P2": ("inputs never change", places.p2),
    "P4": ("a bad pair never stops others", refusals.p4),
    "P5": ("nothing stale is served", stale.p5),
    "P6": ("one clear line per failure, nothing left over; P12: stdout is data only", refusals.p6),
    "P7": ("no crash, hang or blow-up on hostile files", hostile.p7),
    "P8": ("no code from data", hostile.p8),
    "P9": ("nothing written outside the output folder", places.p9),
    "P10": ("units survive", values.p10),
    "P11": ("invalid stays invalid unless --fill", values.p11),
    "P13": ("a clean stop on signals", kills.p13),
    "P14": ("the first run needs no compiler", starts.p14),
    "P15": ("CPU equals CUDA, tiled equals whole", values.p15),
    "P16": ("no network", starts.p16),
    "P17": ("fast start", starts.p17),
}
# Tried together with another.
ALIASES = {"P3": "P1", "P12": "P6"}


def keep(name, counts, folder):
    """Try a promise in an empty folder; yield its lines, also when the trial itself breaks."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield from PROMISES[name][1](counts, folder)
    except Exception as error:
        yield Line(name, PROMISES[name][0], f"broke off: {error!r:.100}", False, [traceback.format_exc()])
