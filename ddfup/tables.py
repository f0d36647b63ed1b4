"""CSV files, as spreadsheets read them without harm."""

from __future__ import annotations

import csv
import io
import math
import numbers
from collections.abc import Iterable, Sequence

# What a spreadsheet may take for a formula at the beginning of a cell.
_FORMULA = ("=", "+", "-", "@", "|", "%")


def csv_bytes(lines: Iterable[Sequence[object]]) -> bytes:
    """Return the UTF-8 bytes of a CSV file.

    Args:
        lines: Cells; what is None, NaN or infinite is left empty, and text becomes such as no spreadsheet takes for a
            formula.
    """
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n").writerows([_cell(value) for value in line] for line in lines)
    return stream.getvalue().encode()


def printable(text: str) -> str:
    """Escape what is not printable: line breaks, direction marks, bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, numbers.Integral):  # Python's or numpy's
        return str(value)
    if isinstance(value, numbers.Real):
        return repr(float(value)) if math.isfinite(value) else ""
    text = printable(str(value))
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text
