"""PGM: 8 or 16-bit integers after a few words of text; what the raw NYU and Kinect recordings are in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddfup.errors import InputError
from ddfup.formats.base import AGAIN, COLOUR_HINT, Format, Header, no_notes

PGM_MAGIC = b"P5"
# Comments may stand before the last word; exactly one blank ends it: the byte after it is a pixel's.
_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_WORDS = re.compile(rb"P5" + _GAP + rb"(\d{1,9})" + _GAP + rb"(\d{1,9})" + _GAP + rb"(\d{1,9})\s")
_LARGEST_HEADER = 4096


def _parse(path: Path) -> tuple[Header, int]:
    with path.open("rb") as stream:
        start = stream.read(_LARGEST_HEADER)
    words = _WORDS.match(start)
    if words is None:
        raise InputError(f"{path}: must be a whole PGM file; its first bytes are {start[:40]!r}", AGAIN)
    width, height, most = (int(word) for word in words.groups())
    if not 255 <= most <= 65535:
        raise InputError(f"{path}: depth must have 8 or 16 bits per pixel; got a largest value of {most}", COLOUR_HINT)
    dtype = np.dtype(np.uint8 if most == 255 else ">u2")
    needed, size = words.end() + dtype.itemsize * width * height, path.stat().st_size
    if width * height and size < needed:
        raise InputError(f"{path}: must be a whole PGM file of {needed} bytes; got {size}", AGAIN)
    return Header(width, height, dtype.newbyteorder("=")), words.end()


def _header(path: Path) -> Header:
    return _parse(path)[0]


def _read(path: Path) -> NDArray[Any]:
    header, offset = _parse(path)
    # The format says: high byte first.
    stored = np.fromfile(path, header.dtype.newbyteorder(">"), header.width * header.height, offset=offset)
    return stored.reshape(header.height, header.width).astype(header.dtype, copy=False)


def _encode(array: NDArray[Any], notes: Mapping[str, str]) -> bytes:
    del notes  # comments would be the place, which many readers stumble over
    height, width = array.shape
    most = 255 if array.dtype.itemsize == 1 else 65535
    return b"P5\n%d %d\n%d\n" % (width, height, most) + array.astype(array.dtype.newbyteorder(">")).tobytes()


PGM = Format("pgm", (".pgm",), (PGM_MAGIC,), frozenset({"u1", "u2"}), _header, _read, no_notes, _encode)
