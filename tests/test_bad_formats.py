"""Damaged and hostile depth files: one clear error each, and nothing worse."""

import struct
import zipfile

import numpy as np
import pytest
from depth_files import RAMP, exr, npy, npy_head, npz, pfm, save, windows, zipped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddfup import io
from ddfup.errors import InputError

EXR = exr({"Z": RAMP})
PFM = pfm(RAMP)
NPZ = npz(depth=RAMP)
ZIPPED_ZEROS = zipped({"depth.npy": npy_head("(5000, 5000)") + bytes(100_000_000)})


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


COMPRESSION = b"compression\0compression\0\1\0\0\0"
BAD = {
    "exr empty": ("d.exr", b"", "must not be empty"),
    "exr called png": ("d.png", EXR, "is not PNG by its content but EXR"),
    "npz called npy": ("d.npy", NPZ, "is not NPY by its content but NPZ"),
    "pfm called exr": ("d.exr", PFM, "is not EXR by its content but PFM"),
    "text called pfm": ("d.pfm", b"PX\n4 3\n-1\n", "is not PFM by its content"),
    "exr of 4 bytes": ("d.exr", EXR[:4], "must be a whole EXR file"),
    "exr cut in its header": ("d.exr", EXR[:100], "must be a whole EXR file"),
    "exr header alone": ("d.exr", EXR[: EXR.index(b"screenWindowWidth") + 40], "must be a whole EXR file"),
    "exr cut in its pixels": ("d.exr", EXR[:-1], "must be a whole EXR file"),
    "exr bomb": (
        "d.exr",
        windows(EXR, stored=(0, 0, 199999, 199999), shown=(0, 0, 199999, 199999)),
        "at most 200000000 pixels; got 200000x200000",
    ),
    "exr hidden bomb": (
        "d.exr",
        windows(EXR, stored=(0, 0, 199999, 199999)),
        "stored pixels must be near the picture's; got 200000x200000 for 4x3",
    ),
    "exr overflow": (
        "d.exr",
        windows(EXR, shown=(-(2**31), -(2**31), 2**31 - 1, 2**31 - 1)),
        "at most 200000000 pixels",
    ),
    "exr of nothing": ("d.exr", windows(EXR, stored=(5, 0, 3, 2)), "at least one pixel"),
    "exr tile bomb": (
        "d.exr",
        patched(
            exr({"Z": RAMP}, tiled=True),
            b"tiles\0tiledesc\0\x09\0\0\0" + struct.pack("<2I", 32, 32),
            b"tiles\0tiledesc\0\x09\0\0\0" + struct.pack("<2I", 1 << 30, 1 << 20),
        ),
        "tiles must be near the picture's size",
    ),
    "exr of a new compression": (
        "d.exr",
        patched(EXR, COMPRESSION + b"\3", COMPRESSION + b"\x0b"),
        "ZIP, PIZ, PXR24, B44 or DWA; got compression 11",
    ),
    "exr of colours": (
        "d.exr",
        exr({"RGB": np.stack([RAMP, RAMP, RAMP + 1], -1)}),
        "depth must have one channel; got different R, G, B",
    ),
    "exr of many channels": (
        "d.exr",
        exr(dict.fromkeys(("left", "right"), RAMP)),
        "depth must be in channel Z, depth.Z, depth.V, depth, or in Y, R or another that is alone; got left, right",
    ),
    "exr of two layers": (
        "d.exr",
        exr(dict.fromkeys(("a.Z", "b.Z"), RAMP)),
        "depth must be in channel Z, depth.Z, depth.V, depth, or in Y, R or another that is alone; got a.Z, b.Z",
    ),
    "exr without a channel": (
        "d.exr",
        patched(EXR, b"Z\0" + struct.pack("<4i", 2, 0, 1, 1), b"Z\0" + struct.pack("<4i", 2, 0, 2, 2)),
        "got none",
    ),
    "exr of nan": ("d.exr", exr({"Z": np.full_like(RAMP, np.nan)}), "has no valid pixel"),
    "pfm of colours": (
        "d.pfm",
        pfm(np.zeros((4, 4)), kind=b"PF"),
        "depth must have one channel (Pf); got 3 (PF)",
    ),
    "pfm cut in its lines": ("d.pfm", b"Pf\n4 ", "must be a whole PFM file; its first lines are"),
    "pfm cut": ("d.pfm", PFM[:-1], f"must be a whole PFM file of {len(PFM)} bytes; got {len(PFM) - 1}"),
    "pfm of scale 0": ("d.pfm", PFM.replace(b"-1\n", b"0\n"), "its first lines are"),
    "pfm of negative size": ("d.pfm", PFM.replace(b"4 3", b"-4 -3"), "its first lines are"),
    "pfm of nothing": ("d.pfm", b"Pf\n0 3\n-1\n", "at least one pixel; got 0x3"),
    "pfm bomb": ("d.pfm", b"Pf\n200000 200000\n-1\n", "must be a whole PFM file of"),
    "npz without keys": ("d.npz", zipped({}), "must have the key 'depth' or one array; got no array"),
    "npz of texts": ("d.npz", zipped({"a.txt": b"hello"}), "got no array"),
    "npz of many keys": ("d.npz", npz(a=RAMP, b=RAMP, c=RAMP), "must have the key 'depth' or one array; got 'a', 'b'"),
    "npz cut": ("d.npz", NPZ[:-1], "must be a whole NPZ file"),
    "npz cut in the middle": ("d.npz", NPZ[: len(NPZ) // 2], "must be a whole NPZ file"),
    "npz of pickles": (
        "d.npz",
        zipped({"depth.npy": npy(np.array([[{}]]), allow_pickle=True)}),
        "pickled objects are never loaded",
    ),
    "npz with a bare pickle": ("d.npz", zipped({"depth.npy": b"\x80\x04N."}), "must be a whole NPZ file"),
    "npz 3-D": ("d.npz", npz(depth=np.ones((2, 2, 3))), "2 dimensions (rows, columns); got shape (2, 2, 3)"),
    "npz complex": ("d.npz", npz(depth=np.ones((2, 2), complex)), "got complex128"),
    "npz of bad method": ("d.npz", zipped({"depth.npy": npy(RAMP)}, zipfile.ZIP_LZMA), "must be stored or deflated"),
    "npz header lies": (
        "d.npz",
        zipped({"depth.npy": npy_head("(200000, 200000)")}),
        "its array must have 160000000128 bytes; got 128",
    ),
    "npz bomb": ("d.npz", ZIPPED_ZEROS, "must not shrink more than 300:1"),
    "npz flipped bit": (
        "d.npz",
        (lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:])(npz(compressed=False, depth=RAMP)),
        "must be a whole NPZ file",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_depth_is_refused_in_one_line(tmp_path, capfd, case):
    name, data, message = BAD[case]
    path = save(tmp_path / name, data)
    with pytest.raises(InputError) as caught:
        io.read_depth(path)
    assert message in caught.value.message
    assert str(path) in caught.value.message and "\n" not in caught.value.message
    assert capfd.readouterr() == ("", ""), "decoders must not speak for themselves"


def test_npz_bomb_is_refused_from_its_header(tmp_path, monkeypatch):
    path = save(tmp_path / "d.npz", ZIPPED_ZEROS)
    monkeypatch.setattr(np, "frombuffer", lambda *arguments: pytest.fail("decoded"))
    with pytest.raises(InputError, match="must not shrink more than 300:1"):
        io.read_depth(path, max_pixels=1000)


def valid_files() -> dict[str, bytes]:
    rows = np.arange(1, 601, dtype=np.float32).reshape(20, 30)
    files = {f"exr {kind}": exr({"Z": rows}, compression=kind) for kind in ("NO", "RLE", "ZIP", "PIZ", "PXR24", "B44")}
    files["exr tiled"] = exr({"RGB": np.stack([rows] * 3, -1)}, tiled=True)
    files |= {"pfm": pfm(rows), "npz": npz(depth=rows), "npz stored": npz(compressed=False, depth=rows)}
    for name in ("png", "tiff", "pgm"):
        files[name] = io.encode_depth(
            rows / 1000, dtype=np.dtype(np.uint16), unit=io.UNITS["mm"], target=io.FORMATS[name]
        )
    files["npy"] = npy(rows)
    return files


VALID = valid_files()


@pytest.mark.parametrize("kind", VALID)
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_cut_file_is_refused(tmp_path, capfd, kind, share):
    data = VALID[kind]
    path = save(tmp_path / f"d{io.FORMATS[kind.split()[0]].suffixes[0]}", data[: max(1, int(len(data) * share))])
    with pytest.raises(InputError):
        io.read_depth(path)
    assert capfd.readouterr() == ("", "")


MUTATIONS = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.sampled_from([b"", b"\0", b"\xff", b"\x80", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
        | st.binary(max_size=4),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("kind", VALID)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(mutations=MUTATIONS, end=st.just(1.0) | st.floats(0, 1))
def test_mutated_files_give_input_errors_only(tmp_path, kind, mutations, end):
    content = bytearray(VALID[kind])
    for place, new, replaces in mutations:
        at = 4 + int(place * (len(content) - 4))
        content[at : at + (len(new) if replaces else 0)] = new
    path = save(
        tmp_path / f"d{io.FORMATS[kind.split()[0]].suffixes[0]}", bytes(content[: max(1, int(end * len(content)))])
    )
    for read in (io.read_depth, io.read_guide):
        try:
            read(path, max_pixels=10_000)
        except InputError as error:
            assert str(path) in error.message
    try:
        io.read_notes(path)
    except InputError as error:
        assert str(path) in error.message
