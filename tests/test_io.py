import io as stdio
import math
import os
import struct
import tracemalloc
import zlib
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from ddfup import io, units
from ddfup.errors import ArgumentError, InputError

MM, M, DISPARITY = io.UNITS["mm"], io.UNITS["m"], io.UNITS["disparity"]


def write_raw(path: Path, array: np.ndarray) -> Path:
    """Store an array by code that is not the project's."""
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, array)
    else:
        assert cv2.imwrite(str(path), array)
    return path


def read_raw(data: bytes, name: str) -> np.ndarray:
    """Decode by code that is not the project's."""
    if name == "npy":
        return np.load(stdio.BytesIO(data))
    if name == "tiff":
        return tifffile.imread(stdio.BytesIO(data))
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def png(width: int, height: int, bits: int, colour: int, body: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.fixture
def u16(tmp_path: Path) -> Path:
    values = np.arange(1, 1201, dtype=np.uint16).reshape(30, 40) * 50
    values[3, 4] = 0
    return write_raw(tmp_path / "depth.png", values)


# --- units ---


@pytest.mark.parametrize(
    ("text", "per_metre"),
    [
        ("mm", 1000),
        ("m", 1),
        ("tum", 5000),
        ("KITTI", 256),
        ("vkitti", 100),
        ("scannet", 1000),
        ("4000", 4000),
    ],
)
def test_unit_means_units_per_metre(text, per_metre):
    assert io.parse_unit(text).per_metre == per_metre


@pytest.mark.parametrize("text", ["", "inch", "0", "-5", "nan", "inf", "1e-300"])
def test_wrong_unit_is_refused(text):
    with pytest.raises(ArgumentError, match="unit must be a name or a number"):
        io.parse_unit(text)


def test_invalid_values():
    assert io.parse_invalid("0, 65535") == (0, 65535)
    first, second = io.parse_invalid("NaN,-inf")
    assert math.isnan(first) and second == -math.inf
    with pytest.raises(ArgumentError, match="numbers with commas"):
        io.parse_invalid("0;1")


# --- round trips ---

STORABLE = [
    ("png", np.uint16),
    ("png", np.uint8),
    ("npy", np.uint8),
    ("npy", np.uint16),
    ("npy", np.int16),
    ("npy", np.int32),
    ("npy", ">u2"),
    ("npy", ">f4"),
    ("npy", np.float16),
    ("npy", np.float32),
    ("npy", np.float64),
    ("tiff", np.uint16),
    ("tiff", np.float16),
    ("tiff", np.float32),
    ("tiff", np.float64),
]


@pytest.mark.parametrize(("name", "dtype"), STORABLE)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), unit=st.sampled_from(["mm", "m", "disparity", "tum", "kitti", "123.4"]))
def test_values_survive_reading_and_writing(tmp_path, name, dtype, data, unit):
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        elements = st.just(0.0) | st.floats(2**-10, 3e4, width=16 if dtype.itemsize == 2 else 32)
    else:
        elements = st.integers(0, min(np.iinfo(dtype).max, 2**22))
    raw = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=elements))
    raw.flat[0] = 7
    meaning = io.parse_unit(unit)
    row = io.FORMATS[name]
    path = write_raw(tmp_path / f"in{row.suffixes[0]}", raw)
    depth = io.read_depth(path, unit=meaning)
    assert depth.dtype == dtype
    np.testing.assert_array_equal(depth.valid, raw != 0)
    per_metre = meaning.per_metre or 1.0
    np.testing.assert_allclose(depth.depth[depth.valid] * per_metre, raw[depth.valid].astype(float), rtol=2e-7)
    again = read_raw(io.encode_depth(depth.depth, dtype=depth.dtype, unit=meaning, target=row), name)
    assert again.dtype == (dtype if name == "npy" else dtype.newbyteorder("="))
    expected = np.where(raw != 0, raw.astype(np.float64), 0 if dtype.kind in "ui" else np.nan)
    np.testing.assert_allclose(again.astype(np.float64), expected, rtol=1e-6 if dtype.kind == "f" else 0)


@settings(max_examples=100, deadline=None)
@given(
    metres=hnp.arrays(np.float32, (2, 3), elements=st.floats(0, 60, width=32)),
    per_metre=st.sampled_from([1000.0, 256.0, 100.0, 7.5]),
)
def test_rounding_is_at_most_half_a_step(metres, per_metre):
    data = io.encode_depth(
        metres, dtype=np.dtype(np.uint16), unit=io.parse_unit(str(per_metre)), target=io.FORMATS["png"]
    )
    stored = read_raw(data, "png")
    assert (stored > 0).all(), "a valid depth must not become the invalid mark"
    for value, step in zip(metres.flat, stored.flat, strict=True):
        exact = Fraction(float(value)) * Fraction(per_metre)
        assert abs(exact - int(step)) <= (Fraction(1, 2) if exact > Fraction(1, 2) else 1)


def test_default_units_follow_the_type(tmp_path):
    integers = write_raw(tmp_path / "a.npy", np.full((2, 2), 1500, np.uint16))
    floats = write_raw(tmp_path / "b.npy", np.full((2, 2), 1.5, np.float32))
    for path, unit in ((integers, MM), (floats, M)):
        depth = io.read_depth(path)
        assert depth.unit == unit
        np.testing.assert_array_equal(depth.depth, np.float32(1.5))


def test_invalid_pixels_are_nan_and_listed(tmp_path):
    raw = np.array([[1.0, 0.0, np.nan], [np.inf, -2.0, 1e10]], np.float32)
    path = write_raw(tmp_path / "a.tif", raw)
    np.testing.assert_array_equal(io.read_depth(path).valid, [[True, False, False], [False, False, True]])
    depth = io.read_depth(path, invalid=(1e10,))
    np.testing.assert_array_equal(depth.valid, [[True, False, False], [False, False, False]])
    assert np.isnan(depth.depth[~depth.valid]).all()
    as_disparity = io.read_depth(path, unit=DISPARITY, invalid=(1e10,))
    assert as_disparity.valid[1, 1] and as_disparity.depth[1, 1] == -2


def test_no_distance_is_no_measurement_whatever_else_is(tmp_path):
    path = tmp_path / "d.npy"
    np.save(path, np.array([[0, 1, 65535, 7]], np.uint16))
    depth = io.read_depth(path, invalid=(65535,))
    assert depth.valid.tolist() == [[False, True, False, True]]
    # A disparity of 0 is a number like any other: infinitely far.
    assert io.read_depth(path, unit=DISPARITY, invalid=(65535,)).valid.tolist() == [[True, True, False, True]]


def test_tiff_nodata_tag_is_invalid(tmp_path):
    path = tmp_path / "gdal.tif"
    tifffile.imwrite(path, np.array([[1, -9999]], np.float32), extratags=[(42113, "s", 0, "-9999", True)])
    np.testing.assert_array_equal(io.read_depth(path, unit=DISPARITY).valid, [[True, False]])


@pytest.mark.parametrize(
    "options", [{"compression": "lzw", "predictor": True}, {"compression": "zstd"}, {"tile": (16, 16)}]
)
def test_tiff_flavours(tmp_path, options):
    raw = np.linspace(1, 5, 600, dtype=np.float32).reshape(20, 30)
    tifffile.imwrite(tmp_path / "a.tiff", raw, **options)
    np.testing.assert_array_equal(io.read_depth(tmp_path / "a.tiff").depth, raw)


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_byte_orders(tmp_path, order):
    raw = np.arange(1, 13, dtype=np.uint16).reshape(3, 4)
    tifffile.imwrite(tmp_path / "a.tif", raw, byteorder=order)
    np.testing.assert_allclose(io.read_depth(tmp_path / "a.tif").depth, raw / 1000, rtol=1e-6)


def test_notes_are_in_the_file():
    notes = {"model": "bäse", "weights_sha256": "ab12"}
    depth = np.ones((2, 2), np.float32)
    data = io.encode_depth(depth, dtype=np.dtype(np.uint16), unit=MM, target=io.FORMATS["png"], notes=notes)
    with Image.open(stdio.BytesIO(data)) as picture:
        assert picture.text["ddfup:unit"] == "mm"
        assert picture.text["ddfup:units_per_metre"] == "1000"
        assert picture.text["ddfup:model"] == "bäse"
        assert picture.text["ddfup:weights_sha256"] == "ab12"
    data = io.encode_depth(depth, dtype=np.dtype(np.float32), unit=M, target=io.FORMATS["tiff"], notes=notes)
    with tifffile.TiffFile(stdio.BytesIO(data)) as tiff:
        assert '"ddfup:weights_sha256": "ab12"' in tiff.pages[0].description


# --- what does not fit is refused, never wrapped ---


@pytest.mark.parametrize(
    ("value", "dtype", "unit", "rule"),
    [
        (65.54, np.uint16, MM, "at most 65.535 m; got 65.54 m"),
        (255.6, np.uint8, DISPARITY, "at most 255; got 255.6"),
        (40.0, np.int16, MM, "at most 32.767 m"),
        (66000.0, np.float16, M, "at most 65504 m"),
        (-0.1, np.uint16, MM, "at least 0 m; got -0.1 m"),
        (9.3e18, np.int64, DISPARITY, "at most 9.22337e+18"),
    ],
)
def test_values_beyond_the_type_are_refused(value, dtype, unit, rule):
    depth = np.array([[1.0, value]], np.float32)
    with pytest.raises(InputError) as caught:
        io.encode_depth(depth, dtype=np.dtype(dtype), unit=unit, target=io.FORMATS["npy"])
    assert rule in caught.value.message and np.dtype(dtype).name in caught.value.message


def test_the_largest_value_still_fits():
    depth = np.array([[65.535, 65.5354]], np.float32)
    data = io.encode_depth(depth, dtype=np.dtype(np.uint16), unit=MM, target=io.FORMATS["png"])
    np.testing.assert_array_equal(read_raw(data, "png"), [[65535, 65535]])


@pytest.mark.parametrize(
    ("dtype", "unit", "target", "expected"),
    [
        (np.uint16, "tum", "png", (np.uint16, "tum")),
        (np.uint16, "mm", "tiff", (np.uint16, "mm")),
        (np.int32, "mm", "png", (np.uint16, "mm")),
        (np.float32, "m", "png", (np.uint16, "mm")),
        (np.float32, "mm", "png", (np.uint16, "mm")),
        (np.float64, "m", "npy", (np.float64, "m")),
    ],
)
def test_storage(dtype, unit, target, expected):
    depth = np.ones((1, 1), np.float32)
    source = io.DepthMap(depth, depth > 0, io.UNITS[unit], np.dtype(dtype), Path("x"), io.FORMATS["npy"])
    assert io.storage(source, io.FORMATS[target]) == (np.dtype(expected[0]), io.UNITS[expected[1]])


def test_float_disparity_does_not_go_into_png():
    depth = np.ones((1, 1), np.float32)
    source = io.DepthMap(depth, depth > 0, DISPARITY, np.dtype(np.float32), Path("x.npy"), io.FORMATS["npy"])
    with pytest.raises(InputError, match=r"x\.npy: disparity in float32 must not be rounded"):
        io.storage(source, io.FORMATS["png"])


# --- bad depth files ---


def npy_header(shape: str, dtype: str = "'<f4'") -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def tiff(width: int, height: int, *, tile: int = 0, following: int = 0) -> bytes:
    """Build a 16-bit TIFF file of one value by hand; ``following`` is the offset of the next directory."""
    entries = {256: width, 257: height, 258: 16, 259: 1, 262: 1, 277: 1}
    size = min(2 * width * height, 2000)
    entries |= {322: tile, 323: tile, 324: 200, 325: size} if tile else {273: 200, 278: height, 279: size}
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    start = struct.pack("<4sIH", b"II*\0", 8, len(entries)) + body + struct.pack("<I", following)
    return start.ljust(200, b"\0") + b"\1\2" * (size // 2)


def save_npy(array: np.ndarray, **options) -> bytes:
    buffer = stdio.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def save_tiff(array: np.ndarray, **options) -> bytes:
    buffer = stdio.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def save_pillow(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = stdio.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


GREY16 = png(4, 3, 16, 0, zlib.compress(b"\0" + b"\1\2" * 4 + (b"\0" + b"\1\2" * 4) * 2))
RGB = Image.new("RGB", (4, 3), (10, 20, 30))

BAD_DEPTH = {
    "empty": ("d.png", b"", "must not be empty; got 0 bytes"),
    "text": ("d.png", b"hello world", "is not PNG by its content; it begins with b'hello wo'"),
    "png called tif": ("d.tif", GREY16, "is not TIFF by its content but PNG"),
    "jpeg": ("d.jpg", save_pillow(RGB, "JPEG"), ".tiff, .exr, .pfm, .pgm, .npy, .npz; got '.jpg'"),
    "no suffix": ("d", GREY16, "got 'no suffix'"),
    "cut header": ("d.png", GREY16[:20], "must be a whole PNG file"),
    "cut png": ("d.png", GREY16[: len(GREY16) // 2], "it ends early"),
    "cut in a chunk": ("d.png", GREY16[: len(GREY16) // 2 + 10], "is cut or damaged"),
    "cut end": ("d.png", GREY16[:-1], "'IEND' part at byte"),
    "no end": ("d.png", GREY16[:-12], "it ends early"),
    "flipped bit": ("d.png", GREY16[:45] + bytes([GREY16[45] ^ 1]) + GREY16[46:], "is cut or damaged"),
    "too little data": ("d.png", png(4, 3, 16, 0, zlib.compress(b"\0\1\2")), "must be a whole PNG file"),
    "png bomb": ("d.png", png(200000, 200000, 16, 0), "at most 200000000 pixels; got 200000x200000"),
    "rgb": ("d.png", save_pillow(RGB, "PNG"), "depth must have one channel; got 3 channels (RGB)"),
    "rgba": ("d.png", save_pillow(RGB.convert("RGBA"), "PNG"), "got 4 channels (RGBA)"),
    "grey alpha": ("d.png", save_pillow(RGB.convert("LA"), "PNG"), "got grey with alpha"),
    "palette": ("d.png", save_pillow(RGB.convert("P"), "PNG"), "got a palette"),
    "one bit": ("d.png", save_pillow(RGB.convert("1"), "PNG"), "must have 16 bits per pixel; got 1"),
    "8 bit": ("d.png", save_pillow(RGB.convert("L"), "PNG"), "8-bit depth has no usual unit"),
    "8-bit npy": ("d.npy", save_npy(np.ones((2, 2), np.uint8)), "8-bit depth has no usual unit"),
    "png of nothing": ("d.png", png(0, 3, 16, 0), "at least one pixel; got 0x3"),
    "cut npy": ("d.npy", save_npy(np.ones((9, 9)))[:-1], "must be a whole NPY file of 776 bytes; got 775"),
    "npy bomb": ("d.npy", npy_header("(200000, 200000)"), "must be a whole NPY file"),
    "negative npy": ("d.npy", npy_header("(-3, 4)"), "got 4x-3"),
    "npy header code": ("d.npy", npy_header("__import__('os')"), "must be a whole NPY file"),
    "npy object": (
        "d.npy",
        save_npy(np.array([[{}]]), allow_pickle=True),
        "pickled objects are never loaded",
    ),
    "npy complex": (
        "d.npy",
        save_npy(np.ones((2, 2), complex)),
        "up to 64 bits; got complex128",
    ),
    "npy bool": ("d.npy", save_npy(np.ones((2, 2), bool)), "integers or floats of up to 64 bits; got bool"),
    "npy text": ("d.npy", save_npy(np.array([["a"]])), "integers or floats"),
    "npy record": ("d.npy", save_npy(np.zeros((2, 2), "f4,f4")), "integers or floats"),
    "npy 3-D": ("d.npy", save_npy(np.ones((2, 2, 3))), "2 dimensions (rows, columns); got shape (2, 2, 3)"),
    "npy 1-D": ("d.npy", save_npy(np.ones(4)), "2 dimensions (rows, columns); got shape (4,)"),
    "npy of nothing": ("d.npy", save_npy(np.ones((0, 5))), "at least one pixel; got 5x0"),
    "tiff bomb": ("d.tif", tiff(200000, 200000), "at most 200000000 pixels; got 200000x200000"),
    "tiff tile bomb": ("d.tif", tiff(16, 16, tile=1 << 20), "tiles must be near the picture's size"),
    "cut tiff": ("d.tif", save_tiff(np.ones((99, 99), np.float32))[:400], "must be a whole TIFF file"),
    "tiff header only": ("d.tif", b"II*\0", "must be a whole TIFF file"),
    "tiff rgb": ("d.tif", save_tiff(np.ones((4, 4, 3), np.uint16), photometric="rgb"), "got 3 channels"),
    "tiff palette": ("d.tif", save_pillow(RGB.convert("P"), "TIFF"), "got a palette"),
    "tiff complex": (
        "d.tif",
        save_tiff(np.ones((4, 4), np.complex64)),
        "integers or floats of up to 64 bits",
    ),
    "zeros": ("d.npy", save_npy(np.zeros((2, 2))), "has no valid pixel: all 4 values"),
    "nans": ("d.npy", save_npy(np.full((2, 2), np.nan)), "has no valid pixel"),
    "negative": ("d.npy", save_npy(np.full((2, 2), -1.0)), "has no valid pixel"),
    "beyond float32": ("d.npy", save_npy(np.full((2, 2), 1e300)), "depth must fit float32; got 1e+300"),
}


@pytest.mark.parametrize("case", BAD_DEPTH)
def test_bad_depth_is_refused_in_one_line(tmp_path, case):
    name, data, message = BAD_DEPTH[case]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        io.read_depth(path)
    assert message in caught.value.message
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_a_loop_of_tiff_directories_is_no_trap(tmp_path):
    path = tmp_path / "d.tif"
    path.write_bytes(tiff(4, 3, following=8))
    np.testing.assert_array_equal(io.read_depth(path).depth, np.full((3, 4), np.float32(0.513)))


def test_missing_folder_and_pipe_are_refused(tmp_path):
    with pytest.raises(InputError, match="must exist; there is no such file"):
        io.read_depth(tmp_path / "none.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="must be a file; got a folder"):
        io.read_depth(tmp_path / "folder.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(InputError, match="must be a file; got a device or pipe"):
            io.read_depth(tmp_path / "pipe.png")


def test_max_pixels_is_checked_before_decoding(u16):
    assert io.read_depth(u16, max_pixels=1200).depth.shape == (30, 40)
    with pytest.raises(InputError, match="at most 1199 pixels; got 40x30 = 1200"):
        io.read_depth(u16, max_pixels=1199)
    with pytest.raises(InputError, match="at most 1199 pixels; got 40x30 = 1200"):
        io.read_guide(u16, max_pixels=1199)


@pytest.mark.parametrize("name", ["d.png", "d.npy", "d.tif"])
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damaged_files_give_input_errors_only(tmp_path, name, data):
    whole = {
        "d.png": GREY16,
        "d.npy": save_npy(np.ones((3, 4))),
        "d.tif": save_tiff(np.ones((3, 4), np.float32)),
    }[name]
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(4, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / name
    path.write_bytes(bytes(content[: data.draw(st.integers(1, len(content)))]))
    for read in (io.read_depth, io.read_guide):
        try:
            read(path, max_pixels=10_000)
        except InputError as error:
            assert str(path) in error.message


# --- pairs ---


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ((256, 192), (1920, 1440)),
        ((80, 60), (641, 479)),
        ((1, 1), (640, 480)),
        ((64, 48), (64, 48)),
        ((9, 1), (90, 12)),
    ],
)
def test_pairs_of_one_view(low, high):
    io.check_pair(Path("d"), low, Path("g"), high)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (
            (640, 480),
            (64, 48),
            "must not be larger than its guide: depth d is 640x480, guide g is 64x48",
        ),
        ((64, 48), (1280, 940), "aspect within 1 %): depth d is 64x48, guide g is 1280x940, 2.1% off"),
        ((256, 192), (1920, 1080), "33.3% off"),
        ((48, 64), (640, 480), "77.8% off"),
    ],
)
def test_pairs_of_two_views_are_refused(low, high, message):
    with pytest.raises(InputError) as caught:
        io.check_pair(Path("d"), low, Path("g"), high)
    assert message in caught.value.message
    if low == (48, 64):
        assert "turned by 90 degrees" in caught.value.hint


# --- guides ---


def scene() -> np.ndarray:
    rows, columns = np.mgrid[0:24, 0:32]
    return np.stack([rows * 9, columns * 7, 255 - rows * 5], axis=-1).astype(np.uint8)


def test_exif_orientation_is_applied(tmp_path):
    upright = scene()
    # How each orientation is stored, by the words of the EXIF standard: where row 0 and column 0 are.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    for orientation, array in stored.items():
        exif = Image.Exif()
        exif[274] = orientation
        for suffix, options in ((".png", {}), (".webp", {"lossless": True})):
            path = tmp_path / f"g{orientation}{suffix}"
            Image.fromarray(np.ascontiguousarray(array)).save(path, exif=exif, **options)
            header = io.read_guide_header(path)
            assert (header.width, header.height) == (32, 24)
            np.testing.assert_array_equal(io.read_guide(path), upright, err_msg=str(path))
        path = tmp_path / f"g{orientation}.tif"
        deep = np.ascontiguousarray(array).astype(np.uint16) * 257
        tifffile.imwrite(path, deep, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
        header = io.read_guide_header(path)
        assert (header.width, header.height) == (32, 24)
        np.testing.assert_array_equal(io.read_guide(path), upright.astype(np.uint16) * 257)


def test_16_bit_guides_keep_their_bits(tmp_path):
    deep = scene().astype(np.uint16) * 251 + 3
    assert cv2.imwrite(str(tmp_path / "rgb.png"), deep[..., ::-1])
    assert cv2.imwrite(str(tmp_path / "grey.png"), deep[..., 0])
    tifffile.imwrite(tmp_path / "planar.tif", np.moveaxis(deep, -1, 0), photometric="rgb", planarconfig="separate")
    for name in ("rgb.png", "planar.tif"):
        np.testing.assert_array_equal(io.read_guide(tmp_path / name), deep, err_msg=name)
    np.testing.assert_array_equal(io.read_guide(tmp_path / "grey.png"), deep[..., :1].repeat(3, axis=-1))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("g.tif" if mode == "CMYK" else "g.png")
    picture = Image.fromarray(scene()).convert(mode)
    picture.save(path)
    guide = io.read_guide(path)
    assert guide.dtype == np.uint8 and guide.shape == (24, 32, 3)
    np.testing.assert_array_equal(guide, np.array(picture.convert("RGB")))


def test_jpeg_guide(tmp_path):
    picture = Image.fromarray(scene())
    picture.save(tmp_path / "g.JPG", quality=95)
    picture.save(tmp_path / "two.jpg", "MPO", save_all=True, append_images=[picture], quality=95)
    for name in ("g.JPG", "two.jpg"):
        assert np.abs(io.read_guide(tmp_path / name).astype(int) - scene()).mean() < 4


BAD_GUIDE = {
    "text": (b"hello world, this is no picture", "its content is none of them"),
    "npy": (save_npy(np.ones((2, 2))), "its content is none of them"),
    "gif": (save_pillow(RGB.convert("P"), "GIF"), "its content is none of them"),
    "empty": (b"", "must not be empty"),
    "cut jpeg": (save_pillow(Image.fromarray(scene()), "JPEG")[:400], "must be a whole"),
    "cut png": (save_pillow(RGB, "PNG")[:-20], "is cut or damaged"),
    "bomb": (png(200000, 200000, 8, 2), "at most 200000000 pixels"),
    "float tiff": (save_tiff(np.ones((4, 4), np.float32)), "8 or 16 bits per channel; got float32"),
}


@pytest.mark.parametrize("case", BAD_GUIDE)
def test_bad_guides_are_refused(tmp_path, case):
    data, message = BAD_GUIDE[case]
    path = tmp_path / "guide.png"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        io.read_guide(path)
    assert message in caught.value.message and str(path) in caught.value.message


def test_pillows_own_pixel_limit_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.fromarray(scene()).save(tmp_path / "g.png")
    assert io.read_guide(tmp_path / "g.png").shape == (24, 32, 3)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("shape", [(1, 1), (3, 700_001), (2100, 1000), (1_200_000, 1)], ids=str)
def test_large_depth_is_stored_without_large_copies(shape):
    depth = np.random.default_rng(0).uniform(0.5, 60, shape).astype(np.float32)
    depth[::7, ::5] = np.nan
    expected = np.where(np.isnan(depth), 0, np.rint(1000 * depth.astype(np.float64))).astype(np.uint16)
    tracemalloc.start()
    try:
        stored = units.quantise(depth, np.dtype(np.uint16), io.UNITS["mm"])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(stored, expected)
    # What is worked on at a time: three arrays of float64 and masks.
    assert peak < stored.nbytes + 40 * min(depth.size, 1 << 20) + 100_000
    depth[-1, -1] = 66
    with pytest.raises(InputError, match=r"at most 65\.535 m; got 66 m"):
        units.quantise(depth, np.dtype(np.uint16), io.UNITS["mm"])
