"""PFM: one float per pixel after three lines of text; rows from the bottom up."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddfup.errors import InputError
from ddfup.formats.base import AGAIN, COLOUR_HINT, Format, Header, no_notes

# Exactly one blank ends the third line: the byte after it may look like a blank but be a pixel's.
_LINES = re.compile(rb"P[Ff]\s+(\d{1,9})\s+(\d{1,9})\s+([-+]?[0-9.]{1,20}(?:[eE][-+]?\d{1,3})?)(?:\r\n|\s)")


def _parse(path: Path) -> tuple[Header, int]:
    with path.open("rb") as stream:
        start = stream.read(256)
    if start.startswith(b"PF"):
        raise InputError(f"{path}: depth must have one channel (Pf); got 3 (PF)", COLOUR_HINT)
    lines = _LINES.match(start)
    scale = float(lines[3]) if lines else 0.0
    if lines is None or not scale:
        raise InputError(f"{path}: must be a whole PFM file; its first lines are {start[:20]!r}", AGAIN)
    # Only the sign of the scale has a meaning that all writers share: below 0 the low byte comes first.
    width, height = int(lines[1]), int(lines[2])
    needed, size = lines.end() + 4 * width * height, path.stat().st_size
    if width * height and size < needed:
        raise InputError(f"{path}: must be a whole PFM file of {needed} bytes; got {size}", AGAIN)
    return Header(width, height, np.dtype("<f4" if scale < 0 else ">f4")), lines.end()


def _header(path: Path) -> Header:
    return _parse(path)[0]


def _read(path: Path) -> NDArray[Any]:
    header, offset = _parse(path)
    count = header.width * header.height
    return np.fromfile(path, header.dtype, count, offset=offset).reshape(header.height, header.width)[::-1]


def _encode(array: NDArray[Any], notes: Mapping[str, str]) -> bytes:
    del notes  # the format has no room for them
    height, width = array.shape
    return b"Pf\n%d %d\n-1.0\n" % (width, height) + array[::-1].astype("<f4").tobytes()


PFM = Format("pfm", (".pfm",), (b"Pf", b"PF"), frozenset({"f4"}), _header, _read, no_notes, _encode)
