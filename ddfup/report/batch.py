"""The report of a batch: what became of each pair, as a page and as a table; no ground truth is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ddfup.report.page import render_batch
from ddfup.tables import csv_bytes

BATCH_FILES = ("batch.html", "batch.csv")
_COLUMNS = (
    *("depth", "guide", "out", "status", "error", "width", "height", "factor", "model", "device", "kernels"),
    *("seconds", "valid_fraction"),
)


def batch_report(
    records: Sequence[Mapping[str, Any]], *, title: str, seconds: float, previews: Mapping[str, str]
) -> dict[str, bytes]:
    """Return the files of the report.

    Args:
        records: One for each pair, with the keys that the command line prints.
        title: The output folder.
        seconds: How long the batch took.
        previews: Output -> address of its preview, relative to the page.

    Returns:
        Name -> content.
    """
    ordered = sorted(records, key=lambda record: str(record["out"]))
    return {
        "batch.html": render_batch(ordered, title=title, seconds=seconds, previews=previews),
        "batch.csv": _encode_csv(ordered),
    }


def is_batch_report(name: str, data: bytes) -> bool:
    """Tell whether a file of such a name is an older report, and so may be replaced."""
    if name == "batch.csv":
        return data.startswith(",".join(_COLUMNS).encode() + b"\n")
    return data.startswith(b"<!doctype html>") and b"Depth batch: " in data[: 1 << 16]


def _encode_csv(records: Sequence[Mapping[str, Any]]) -> bytes:
    return csv_bytes([_COLUMNS, *([record[name] for name in _COLUMNS] for record in records)])
