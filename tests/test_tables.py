"""Cells as a reader of CSV gets them back."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from ddfup.tables import csv_bytes, printable


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        *[(None, ""), (float("nan"), ""), (float("-inf"), ""), (np.float32("nan"), ""), (np.float64("inf"), "")],
        *[(0, "0"), (-3, "-3"), (np.int64(-3), "-3"), (True, "True"), (0.1, "0.1"), (-2.5e-9, "-2.5e-09")],
        *[(np.float64(0.1), "0.1"), (np.float32(0.5), "0.5"), ("a,b", "a,b"), ('say "x"', 'say "x"'), ("", "")],
        *[
            ("=1", "'=1"),
            (" +1", "' +1"),
            ("-1", "'-1"),
            ("@a", "'@a"),
            ("|a", "'|a"),
            ("%a", "'%a"),
            (Path("=a"), "'=a"),
        ],
        *[("a\nb", r"a\nb"), ("\t=1", r"\t=1"), ("\udc80", r"\udc80"), ("\u202etxt", r"\u202etxt"), ("Tür", "Tür")],
    ],
)
def test_cells(value, cell):
    data = csv_bytes([["name", "other"], [value, "end"]])
    assert list(csv.reader(io.StringIO(data.decode(), newline=""))) == [["name", "other"], [cell, "end"]]


def test_printable_keeps_what_can_be_seen():
    assert printable("küche 1/深度.png") == "küche 1/深度.png"
    assert printable("a\x00\x1b[2J") == r"a\x00\x1b[2J"
