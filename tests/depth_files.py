"""Depth files as other programs write them, and pieces of broken ones."""

import io as stdio
import struct
import zipfile
from pathlib import Path

import numpy as np
import OpenEXR

RAMP = np.linspace(1, 5, 12, dtype=np.float32).reshape(3, 4)


def exr(channels: dict[str, np.ndarray], *, compression: str = "ZIP", tiled: bool = False) -> bytes:
    kind = OpenEXR.tiledimage if tiled else OpenEXR.scanlineimage
    header = {"compression": getattr(OpenEXR, f"{compression}_COMPRESSION"), "type": kind}
    if tiled:
        header["tiles"] = OpenEXR.TileDescription()
    buffer = stdio.BytesIO()
    with OpenEXR.File(header, channels) as file:
        file.write(buffer)
    return buffer.getvalue()


def npz(*, compressed: bool = True, **arrays: np.ndarray) -> bytes:
    buffer = stdio.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def pfm(array: np.ndarray, *, scale: float = -1, kind: bytes = b"Pf") -> bytes:
    order = "<f4" if scale < 0 else ">f4"
    head = b"%s\n%d %d\n%g\n" % (kind, array.shape[1], array.shape[0], scale)
    return head + array[::-1].astype(order).tobytes()


def save(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def windows(data: bytes, *, stored: tuple[int, ...] | None = None, shown: tuple[int, ...] | None = None) -> bytes:
    """Change the data and display windows (left, top, right, bottom; inclusive) of an EXR file."""
    for name, window in ((b"dataWindow", stored), (b"displayWindow", shown)):
        if window is not None:
            at = data.index(name + b"\0box2i\0") + len(name) + 11
            data = data[:at] + struct.pack("<4i", *window) + data[at + 16 :]
    return data


def zipped(content: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = stdio.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def npy(array: np.ndarray, **options: bool) -> bytes:
    buffer = stdio.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def npy_head(shape: str, dtype: str = "'<f4'") -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
