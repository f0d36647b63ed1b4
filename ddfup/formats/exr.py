"""OpenEXR: one channel of depth, or the colours of a guide; half and float are read, float is written.

The header is parsed here, so that sizes are known before the library decodes or allocates anything.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddfup._stderr import quiet_stderr
from ddfup.errors import InputError
from ddfup.formats.base import AGAIN, COLOUR_HINT, Format, Header

EXR_MAGIC = b"v/1\x01"
# What renderers write where they see nothing; beside infinity.
BACKGROUND = 1e10
# How many channels an error message names.
_LISTED = 16
_RENAME = "rename the channel that holds depth to Z, or save it alone"
_TYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype(np.uint32),
    1: np.dtype(np.float16),
    2: np.dtype(np.float32),
}
_LONG_NAMES, _DEEP = 0x400, 0x800
# DWAB. The decoder of the later ones (HTJ2K) writes to stdout.
_LAST_COMPRESSION = 9
_LARGEST_HEADER = 1 << 20


@dataclass(frozen=True)
class ExrHeader:
    """What the first part's header of an EXR file says.

    Attributes:
        display: (left, top, right, bottom) of the picture, the last ones outside.
        data: The same of the pixels in the file, which may be fewer or more.
        channels: Type of every channel.
        notes: Attributes that are texts.
    """

    display: tuple[int, int, int, int]
    data: tuple[int, int, int, int]
    channels: dict[str, np.dtype[Any]]
    notes: dict[str, str]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the picture."""
        left, top, right, bottom = self.display
        return right - left, bottom - top


def exr_header(path: Path) -> ExrHeader:
    """Parse the header of an EXR file's first part.

    Raises:
        InputError: If it is damaged, or its pixels are not plain ones.
    """
    with path.open("rb") as stream:
        start = stream.read(_LARGEST_HEADER)
    attributes = dict(_attributes(path, start))
    flags = struct.unpack("<I", start[4:8])[0]
    if flags & _DEEP or attributes.get("type", b"")[:4] == b"deep":
        raise InputError(f"{path}: must have one sample per pixel; got a deep EXR", "flatten it")
    windows = []
    for name in ("displayWindow", "dataWindow"):
        left, top, right, bottom = struct.unpack("<4i", attributes[name])
        windows.append((left, top, right + 1, bottom + 1))
    display, data = windows
    width, height, across, down = (window[i + 2] - window[i] for window in windows for i in (0, 1))
    if min(width, height, across, down) < 1:
        raise InputError(
            f"{path}: must have at least one pixel; got {width}x{height}, of which {across}x{down} stored", AGAIN
        )
    if across * down > max(4 * width * height, 1 << 22):
        raise InputError(
            f"{path}: stored pixels must be near the picture's; got {across}x{down} for {width}x{height}",
            f"if the file is right, crop it to its display window; else {AGAIN}",
        )
    if "tiles" in attributes:
        # The library would allocate a tile larger than the picture.
        across, down = struct.unpack_from("<2I", attributes["tiles"])
        if not 1 <= across * down <= max(4 * width * height, 1 << 20):
            raise InputError(
                f"{path}: tiles must be near the picture's size; got {across}x{down}", "save it without tiles"
            )
    if attributes["compression"][0] > _LAST_COMPRESSION:
        raise InputError(
            f"{path}: EXR must be uncompressed, RLE, ZIP, PIZ, PXR24, B44 or DWA; got compression "
            f"{attributes['compression'][0]}",
            "save it with ZIP compression",
        )
    notes = {
        name: value.decode("utf-8", "replace")
        for name, value in attributes.items()
        if name.startswith("ddfup:") or name in ("comments", "owner", "capDate", "software", "Software")
    }
    return ExrHeader(display, data, _channels(path, attributes["channels"]), notes)


def _attributes(path: Path, start: bytes) -> Iterator[tuple[str, bytes]]:
    flags = struct.unpack("<I", start[4:8])[0]
    longest = 255 if flags & _LONG_NAMES else 31
    position = 8
    while True:
        name, after_name = _text(path, start, position, longest)
        if not name:
            return
        _, after_kind = _text(path, start, after_name, longest)
        (size,) = struct.unpack_from("<i", start, after_kind)
        position = after_kind + 4 + size
        if size < 0 or position > len(start):
            raise InputError(f"{path}: must be a whole EXR file; its header ends in {name!r}", AGAIN)
        yield name, start[after_kind + 4 : position]


def _text(path: Path, start: bytes, position: int, longest: int) -> tuple[str, int]:
    end = start.find(b"\0", position, position + longest + 1)
    if end < 0:
        raise InputError(f"{path}: must be a whole EXR file; its header is cut or damaged", AGAIN)
    return start[position:end].decode("utf-8"), end + 1


def _channels(path: Path, data: bytes) -> dict[str, np.dtype[Any]]:
    channels, position = {}, 0
    while data[position] != 0:
        name, position = _text(path, data, position, 255)
        kind, _, across, down = struct.unpack_from("<4i", data, position)
        position += 16
        if (across, down) == (1, 1):  # others have fewer samples than pixels: chroma, never depth
            channels[name] = _TYPES[kind]
    return channels


def exr_pixels(path: Path, header: ExrHeader, names: Sequence[str]) -> list[NDArray[Any]]:
    """Decode channels to the picture's size; pixels that are not stored are NaN, or 0 for integers."""
    import OpenEXR

    left, top, right, bottom = header.data
    with path.open("rb") as stream, quiet_stderr():
        # By name the library knows how long the file is, and makes no room for what damaged lengths promise. It
        # crashes on names that are no UTF-8.
        name = str(path)
        file = OpenEXR.InputFile(name if _is_utf8(name) else f"/dev/fd/{stream.fileno()}")
        try:
            planes = [file.channel(name) for name in names]
        finally:
            file.close()
    result = []
    for name, plane in zip(names, planes, strict=True):
        dtype = header.channels[name]
        pixels = np.frombuffer(plane, dtype).reshape(bottom - top, right - left)
        if header.data != header.display:
            pixels = _place(pixels, header)
        result.append(pixels)
    return result


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _place(pixels: NDArray[Any], header: ExrHeader) -> NDArray[Any]:
    (left, top, right, bottom), (x, y, _, _) = header.display, header.data
    placed = np.full((bottom - top, right - left), 0 if pixels.dtype.kind == "u" else np.nan, pixels.dtype)
    inner = pixels[max(top - y, 0) : max(bottom - y, 0), max(left - x, 0) : max(right - x, 0)]
    down, across = max(y - top, 0), max(x - left, 0)
    target = placed[down : down + inner.shape[0], across : across + inner.shape[1]]
    target[...] = inner[: target.shape[0], : target.shape[1]]
    return placed


# --- depth ---


def _depth_channels(path: Path, header: ExrHeader) -> list[str]:
    """Return the channel that holds depth, and those that must hold the same."""
    names = list(header.channels)
    # X, Y and Z of one layer are a direction or a position.
    vectors = {layer + axis for layer in {name[:-1] for name in names} for axis in "XYZ" if _is_vector(layer, names)}
    plain = [name for name in names if name not in vectors]
    for name in ("Z", "depth.Z"):
        if name in plain:
            return [name]
    called = _called_depth(plain)
    if len(called) > 1:
        several = ", ".join(channels[0] for channels in called)
        raise InputError(f"{path}: depth must be in one channel; got {several} among {_listed(names)}", _RENAME)
    if called:
        return called[0]
    layers = [name for name in plain if name.endswith(".Z")]
    if len(layers) == 1:
        return layers
    # Beside other passes Y, or R, G and B, are a picture, grey or not. Alone, three equal ones are a common way to
    # store one.
    rest = set(names) - {"A"}
    if rest == {"Y"}:
        return ["Y"]
    if "R" in rest and rest <= set("RGB"):
        return [name for name in "RGB" if name in rest]
    if len(names) == 1:
        return names
    raise InputError(
        f"{path}: depth must be in channel Z, depth.Z, depth.V, depth, or in Y, R or another that is alone; "
        f"got {_listed(names) or 'none'}",
        _RENAME,
    )


def _is_vector(layer: str, names: Sequence[str]) -> bool:
    return {layer + axis for axis in "XYZ"} <= set(names)


def _called_depth(names: Sequence[str]) -> list[list[str]]:
    """Return what is called depth, channels or layers, whatever comes before the word: Depth, zdepth, VRayZDepth."""
    found: dict[str, list[str]] = {}
    for name in names:
        layer, dot, channel = name.rpartition(".")
        if channel.lower().endswith("depth"):
            found[name] = [name]
        elif layer.lower().endswith("depth") and channel.lower() not in ("a", "alpha"):
            found.setdefault(layer + dot, []).append(name)
    # Compositors write a pass of one value as V or Z, others as equal colours.
    return [
        next(([layer + channel] for channel in "VZ" if layer + channel in channels), channels)
        for layer, channels in found.items()
    ]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def _header(path: Path) -> Header:
    header = exr_header(path)
    return Header(*header.size, header.channels[_depth_channels(path, header)[0]], BACKGROUND)


def _read(path: Path) -> NDArray[Any]:
    header = exr_header(path)
    names = _depth_channels(path, header)
    depth, *others = exr_pixels(path, header, names)
    for other in others:
        if not np.array_equal(depth, other, equal_nan=True):
            raise InputError(f"{path}: depth must have one channel; got different {', '.join(names)}", COLOUR_HINT)
    return depth


def _notes(path: Path) -> dict[str, str]:
    header = exr_header(path)
    channels = ", ".join(f"{name} ({dtype})" for name, dtype in list(header.channels.items())[:50])
    return {"channels": channels, **header.notes}


def _encode(array: NDArray[Any], notes: Mapping[str, str]) -> bytes:
    import OpenEXR

    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    header |= {f"ddfup:{key}": text for key, text in notes.items()}
    buffer = io.BytesIO()
    with OpenEXR.File(header, {"Z": np.ascontiguousarray(array, np.float32)}) as file:
        file.write(buffer)
    return buffer.getvalue()


EXR = Format("exr", (".exr",), (EXR_MAGIC,), frozenset({"f4"}), _header, _read, _notes, _encode)
