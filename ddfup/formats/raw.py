"""Numbers without a header, as ARKit apps and Record3D store depth and confidence: the user gives the size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddfup.errors import InputError
from ddfup.formats.base import Format, Header, no_notes

# Low byte first. Where the user names no type: confidence, half or float, by bytes per pixel.
RAW_TYPES: dict[str, np.dtype[Any]] = {
    "u8": np.dtype("u1"),
    "u16": np.dtype("<u2"),
    "f16": np.dtype("<f2"),
    "f32": np.dtype("<f4"),
}
_BY_SIZE = {1: "u8", 2: "f16", 4: "f32"}
# (width, height), and the type if the user named one.
Raw = tuple[int, int] | tuple[int, int, str]
_LZFSE_MAGIC = b"bvx"


def raw_format(width: int, height: int, kind: str = "") -> Format:
    """Return a row for headerless files of one size, to be read only; LZFSE (Record3D) is unpacked.

    Args:
        width: Columns.
        height: Rows.
        kind: Key of `RAW_TYPES`, or nothing: by the bytes per pixel.
    """
    rule = f"raw {width}x{height}:{kind} must have {RAW_TYPES[kind].itemsize} bytes per pixel" if kind else ""
    rule = rule or f"raw {width}x{height} must have 1, 2 or 4 bytes per pixel"

    def read(path: Path) -> NDArray[Any]:
        data = path.read_bytes()
        pixels = width * height
        if data.startswith(_LZFSE_MAGIC):
            import imagecodecs

            # One byte more than the largest type needs, so that too much is noticed and no more is made.
            data = bytes(imagecodecs.lzfse_decode(data, out=4 * pixels + 1))
        size = len(data) / pixels
        if size != RAW_TYPES[kind].itemsize if kind else size not in _BY_SIZE:
            raise InputError(
                f"{path}: {rule}; got {len(data)} bytes = {size:g}",
                "check --raw; Record3D's depth stands upright: 192x256",
            )
        return np.frombuffer(data, RAW_TYPES[kind or _BY_SIZE[int(size)]]).reshape(height, width)

    def read_header(path: Path) -> Header:
        # The type follows from the size that is unpacked, which the user's size bounds.
        if path.stat().st_size > 4 * width * height + 64:
            raise InputError(
                f"{path}: {rule}; got {path.stat().st_size} bytes",
                "check --raw",
            )
        return Header(width, height, read(path).dtype)

    return Format("raw", (), (b"",), frozenset(), read_header, read, no_notes, _encode)


def _encode(array: NDArray[Any], notes: Mapping[str, str]) -> bytes:
    raise NotImplementedError("raw files are read only")
