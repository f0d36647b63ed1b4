"""NPY and NPZ: numpy's own files; headers are read first, pickles never."""

from __future__ import annotations

import io
import itertools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ddfup.errors import InputError
from ddfup.formats.base import NUMBERS, Format, Header, check_ratio, no_notes

NPY_MAGIC = b"\x93NUMPY"
_KEY = "depth"


def _array_header(path: Path, stream: IO[bytes]) -> tuple[Header, bool, int]:
    """Read an array's header: size and type, whether columns come first, bytes of the array."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise InputError(f"{path}: NPY must be version 1.0 or 2.0; got {version}", "save plain numbers with numpy")
    shape, fortran, dtype = readers[version](stream)
    height, width = _map_shape(path, shape)
    if dtype.hasobject:
        raise InputError(
            f"{path}: depth must be plain numbers; got {dtype} (pickled objects are never loaded)",
            "save it as float32: np.save(file, depth.astype(np.float32))",
        )
    return Header(width, height, dtype), fortran, height * width * dtype.itemsize


def _map_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of an array's one map; axes of length 1 before and after them do not count."""
    others = len(shape) - 2
    maps = {pair for pair in itertools.pairwise(shape) if shape.count(1) - pair.count(1) == others}
    if len(maps) == 1:
        height, width = maps.pop()
        return int(height), int(width)
    raise InputError(
        f"{path}: depth must have 2 dimensions (rows, columns); got shape {shape}", f"save {_one_map(shape)}"
    )


def _one_map(shape: tuple[int, ...]) -> str:
    """Say in numpy's words how rows and columns come out of another shape."""
    long = len(shape) - shape.count(1)
    if long < 2:
        return "it as rows and columns: depth.reshape(rows, columns)"
    if long == 2:
        return "it as rows and columns: np.squeeze(depth)"
    # Rows and columns are side by side, and more than channels and frames.
    before = max(range(len(shape) - 1), key=lambda axis: shape[axis] * shape[axis + 1])
    after = len(shape) - 2 - before
    return f"one map: depth[{', '.join(['0'] * before + ['...'] * bool(after) + ['0'] * after)}]"


# --- NPY ---


def _npy_header(path: Path) -> Header:
    with path.open("rb") as stream:
        header, _, needed = _array_header(path, stream)
        needed += stream.tell()
    size = path.stat().st_size
    if size < needed:
        raise InputError(f"{path}: must be a whole NPY file of {needed} bytes; got {size}", "save it again")
    return header


def _npy_read(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, allow_pickle=False)
    return array.reshape(_map_shape(path, array.shape))


def _npy_encode(array: NDArray[Any], notes: Mapping[str, str]) -> bytes:
    del notes  # the format has no room for them
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


# --- NPZ ---


def _pick(path: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """Return the archive's depth: the key ``depth``, else its only array."""
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    arrays = {name: info for name, info in members.items() if info.filename.endswith(".npy")}
    # The texts that we write beside the depth are none.
    named = [name for name in arrays if not name.startswith("ddfup:")]
    if _KEY not in arrays and len(named) != 1:
        names = ", ".join(repr(name) for name in named[:8]) + (", ..." if len(named) > 8 else "")
        raise InputError(
            f"{path}: must have the key {_KEY!r} or one array; got {names or 'no array'}",
            f"save it as np.savez_compressed(file, {_KEY}=...)",
        )
    info = arrays[_KEY if _KEY in arrays else named[0]]
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{path}: must be stored or deflated; got zip method {info.compress_type}", "save it by numpy")
    return info


@contextmanager
def _npz_array(path: Path) -> Iterator[tuple[IO[bytes], Header, bool, int]]:
    """Open the depth in an archive after checking its header; no more than the header is decompressed."""
    with zipfile.ZipFile(path) as archive:
        info = _pick(path, archive)
        with archive.open(info) as stream:
            header, fortran, needed = _array_header(path, stream)
            size = stream.tell() + needed
            if info.file_size != size:
                raise InputError(f"{path}: its array must have {size} bytes; got {info.file_size}", "save it again")
            check_ratio(path, needed, info.compress_size)
            yield stream, header, fortran, needed


def _npz_header(path: Path) -> Header:
    with _npz_array(path) as (_, header, _, _):
        return header


def _npz_read(path: Path) -> NDArray[Any]:
    with _npz_array(path) as (stream, header, fortran, needed):
        # One byte more than there is: only at the end is the checksum compared.
        data = stream.read(needed + 1)
        shape = (header.height, header.width)
        return np.frombuffer(data, header.dtype).reshape(shape, order="F" if fortran else "C")


def _npz_notes(path: Path) -> dict[str, str]:
    notes = {}
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        notes["keys"] = ", ".join(info.filename.removesuffix(".npy") for info in infos[:100])
        for info in infos:
            if info.filename.startswith("ddfup:") and info.file_size < 10_000:
                with archive.open(info) as stream:
                    text = np.load(io.BytesIO(stream.read(10_000)), allow_pickle=False)
                notes[info.filename.removesuffix(".npy")] = str(text)
    return notes


def _npz_encode(array: NDArray[Any], notes: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    texts = {f"ddfup:{key}": np.array(text) for key, text in notes.items()}
    np.savez_compressed(buffer, **{_KEY: array, **texts})  # type: ignore[arg-type]
    return buffer.getvalue()


NPY = Format("npy", (".npy",), (NPY_MAGIC,), NUMBERS, _npy_header, _npy_read, no_notes, _npy_encode)
NPZ = Format("npz", (".npz",), (b"PK\3\4", b"PK\5\6"), NUMBERS, _npz_header, _npz_read, _npz_notes, _npz_encode)
