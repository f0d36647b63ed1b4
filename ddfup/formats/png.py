"""PNG: 8 and 16-bit grey depth; every chunk's checksum is verified."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddfup.errors import InputError
from ddfup.formats.base import AGAIN, COLOUR_HINT, Format, Header
from ddfup.formats.orientation import ORIENTATION_TAG, UPRIGHT, known_orientation, upright_size

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def _header(path: Path) -> Header:
    with path.open("rb") as stream:
        start = stream.read(26)
    width, height, bits, colour = struct.unpack(">IIBB", start[16:26])
    if colour != 0:
        kinds = {2: "3 channels (RGB)", 3: "a palette", 4: "grey with alpha", 6: "4 channels (RGBA)"}
        raise InputError(
            f"{path}: depth must have one channel; got {kinds.get(colour, f'colour type {colour}')}",
            COLOUR_HINT,
        )
    if bits not in (8, 16):
        raise InputError(f"{path}: depth must have 16 bits per pixel; got {bits}", COLOUR_HINT)
    orientation = png_orientation(path)
    dtype = np.dtype(np.uint8 if bits == 8 else np.uint16)
    return Header(*upright_size(width, height, orientation), dtype, orientation=orientation)


def png_orientation(path: Path) -> int:
    """Return the orientation in a PNG file's EXIF, after checking all of its chunks."""
    body = b""
    for kind, content in png_chunks(path):
        if kind == b"eXIf":
            body = bytes(content)
    if not body:
        return UPRIGHT
    from PIL import Image

    exif = Image.Exif()
    try:
        exif.load(body)
    except Exception:  # what is no EXIF says nothing of the pixels, and Pillow says so in several ways
        return UPRIGHT
    return known_orientation(exif.get(ORIENTATION_TAG))


def png_chunks(path: Path) -> Iterator[tuple[bytes, memoryview]]:
    """Yield kind and content of every chunk after checking it: decoders let cut ends and flipped bits pass."""
    view = memoryview(path.read_bytes())
    position, kind = len(PNG_MAGIC), b""
    while kind != b"IEND":
        head = bytes(view[position : position + 8])
        if len(head) < 8:
            raise InputError(f"{path}: must be a whole PNG file; it ends early", AGAIN)
        (length,), kind = struct.unpack(">I", head[:4]), head[4:]
        body = view[position + 4 : position + 8 + length]
        check = view[position + 8 + length : position + 12 + length]
        if len(body) < 4 + length or len(check) < 4 or zlib.crc32(body) != int.from_bytes(check, "big"):
            name = kind.decode("ascii", "replace")
            raise InputError(
                f"{path}: must be a whole PNG file; its {name!r} part at byte {position} is cut or damaged", AGAIN
            )
        yield kind, body[4:]
        position += 12 + length


def png_read(path: Path) -> NDArray[Any]:
    """Decode a PNG file as it is stored, 16 bits included."""
    import imagecodecs

    for _ in png_chunks(path):
        pass
    image: NDArray[Any] = imagecodecs.png_decode(path.read_bytes())
    return image


def _read(path: Path) -> NDArray[Any]:
    image = png_read(path)
    # A grey that is to be transparent (tRNS) comes as a channel of its own.
    return image[..., 0] if image.ndim == 3 and image.shape[-1] == 2 else image


def _notes(path: Path) -> dict[str, str]:
    notes = {}
    for kind, body in png_chunks(path):
        key, _, rest = bytes(body[:10_000]).partition(b"\0")
        name = key.decode("latin-1")
        if kind == b"tEXt":
            notes[name] = rest.decode("latin-1")
        elif kind == b"iTXt" and rest[:1] == b"\0":
            # Not compressed; language and translated key come before the text.
            notes[name] = rest[2:].split(b"\0", 2)[-1].decode("utf-8", "replace")
    return notes


def _encode(array: NDArray[Any], notes: Mapping[str, str]) -> bytes:
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for key, text in notes.items():
        info.add_text(f"ddfup:{key}", text)
    buffer = io.BytesIO()
    # Level 1 is six times as fast as the default at 1920x1440 and a few percent larger.
    Image.fromarray(array.astype(array.dtype.newbyteorder("="), copy=False)).save(
        buffer, "PNG", compress_level=1, pnginfo=info
    )
    return buffer.getvalue()


PNG = Format("png", (".png",), (PNG_MAGIC,), frozenset({"u1", "u2"}), _header, _read, _notes, _encode)
