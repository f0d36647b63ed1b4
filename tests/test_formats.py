"""Formats, types and units against one another; files of other programs; confidence."""

import io as stdio
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import OpenEXR
import pytest
import tifffile
from depth_files import RAMP, exr, npy, npz, pfm, save, windows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torture.round_trips import TABLE, beyond, depths_for, round_trip, units_of

from ddfup import io
from ddfup.errors import ArgumentError, InputError

# --- format x type x unit ---


@pytest.mark.parametrize(("name", "dtype"), TABLE, ids=str)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    shares=hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 4)), elements=st.floats(0, 1)),
    holes=st.integers(0, 2**16 - 1),
)
def test_round_trip_is_within_half_a_step(tmp_path, name, dtype, shares, holes):
    invalid = (holes >> np.arange(shares.size) & 1).astype(bool).reshape(shares.shape)
    invalid.flat[0] = False
    for unit in units_of(dtype):
        errors = round_trip(name, dtype, unit, depths_for(shares, invalid, dtype, unit), tmp_path)
        assert errors.masks == 0, unit
        assert errors.stored <= 0.5 + 1e-6 and errors.near_zero <= 1, unit
        assert errors.read <= 1e-6, unit


@pytest.mark.parametrize(
    ("name", "dtype"), [row for row in TABLE if row[1].kind in "ui" and row[1].itemsize <= 4], ids=str
)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(excess=st.floats(0, 1e-4) | st.floats(0, 1e4))
def test_what_is_beyond_is_refused_or_the_nearest_end(tmp_path, name, dtype, excess):
    for unit in units_of(dtype):
        value = np.float32(io.limits(dtype, unit)[1] * (1 + excess))
        refused, error = beyond(name, dtype, unit, value, tmp_path)
        assert refused or error <= (0 if unit.name == "nyu-raw" else 0.5), unit


def test_the_nearest_of_a_kinect_is_refused():
    depth = np.array([[0.2, 1.0]], np.float32)
    with pytest.raises(InputError, match=r"at least 0\.3217\d* m; got 0\.2 m"):
        io.encode_depth(depth, dtype=np.dtype(np.uint16), unit=io.UNITS["nyu-raw"], target=io.FORMATS["png"])


@pytest.mark.parametrize("name", ["exr", "pfm"])
@pytest.mark.parametrize(
    ("dtype", "unit", "expected"),
    [
        (np.uint16, "mm", "m"),
        (np.uint16, "sunrgbd", "m"),
        (np.uint8, "disparity", "disparity"),
        (np.float64, "m", "m"),
        (np.float16, "kitti", "kitti"),
        (np.float32, "disparity", "disparity"),
    ],
)
def test_formats_of_float32_alone(name, dtype, unit, expected):
    source = io.DepthMap(RAMP, RAMP > 0, io.UNITS[unit], np.dtype(dtype), Path("x"), io.FORMATS["npy"])
    assert io.storage(source, io.FORMATS[name]) == (np.dtype(np.float32), io.UNITS[expected])


# --- presets that change bits ---


def test_sun_rgbd(tmp_path):
    # As its toolbox writes 1.2 m and 8.191 m: the three highest bits come last.
    raw = np.array([[1200 << 3, 8191 << 3, (0b101 << 13 | 77) << 3 & 0xFFFF | 0b101, 0]], np.uint16)
    path = save(tmp_path / "d.npy", b"")
    np.save(path, raw)
    depth = io.read_depth(path, unit=io.UNITS["sunrgbd"])
    np.testing.assert_allclose(depth.depth, [[1.2, 8.191, (0b101 << 13 | 77) / 1000, np.nan]], rtol=1e-6)


def test_nyu_raw(tmp_path):
    # Disparities with their two bytes swapped; 2047 and 0 are no measurement.
    raw = np.array([[600, 1000, 1092, 1093, 2047, 0]], ">u2").view("<u2")
    path = save(tmp_path / "d.npy", b"")
    np.save(path, raw)
    depth = io.read_depth(path, unit=io.UNITS["nyu-raw"])
    np.testing.assert_allclose(depth.depth[0, :3], [351.3 / 492.5, 351.3 / 92.5, 351.3 / 0.5], rtol=1e-6)
    np.testing.assert_array_equal(depth.valid, [[True, True, True, False, False, False]])


@pytest.mark.parametrize("unit", ["sunrgbd", "nyu-raw"])
def test_presets_of_bits_need_16_bits(tmp_path, unit):
    path = save(tmp_path / "d.npz", npz(depth=RAMP))
    with pytest.raises(InputError, match=f"unit {unit} is for unsigned 16-bit values; got float32"):
        io.read_depth(path, unit=io.UNITS[unit])


# --- files of other programs ---


@pytest.mark.parametrize(
    "names",
    [
        ["Z"],
        ["R", "Z"],
        ["depth.Z", "colour.R"],
        ["View Layer.Depth.Z", "View Layer.Combined.R", "View Layer.Combined.G"],
        ["Y"],
        ["R"],
        ["A", "R"],
        ["distance"],
        ["Depth.V", "Image.R", "Image.G", "Image.B"],
        ["DEPTH", "R", "G", "B"],
    ],
)
def test_exr_channels(tmp_path, names):
    order = ["Z", "depth.Z", "View Layer.Depth.Z", "Depth.V", "DEPTH", "Y", "R", "distance"]
    depth = next(name for name in order if name in names)
    channels = {name: RAMP if name == depth else np.full_like(RAMP, 77) for name in names}
    path = save(tmp_path / "d.exr", exr(channels))
    np.testing.assert_array_equal(io.read_depth(path).depth, RAMP)


def test_exr_of_three_equal_channels(tmp_path):
    path = save(tmp_path / "d.exr", exr({"RGB": np.stack([RAMP] * 3, -1)}))
    np.testing.assert_array_equal(io.read_depth(path).depth, RAMP)


# What the renderers write beside depth: a picture, directions, positions.
NORMAL = ["Normal.X", "Normal.Y", "Normal.Z"]
BEAUTY = ["R", "G", "B"]


@pytest.mark.parametrize(
    ("depth", "others"),
    [
        (["Depth.V"], NORMAL),
        (["ViewLayer.Depth.V"], [f"ViewLayer.{name}" for name in (*NORMAL, "Combined.R", "Combined.G")]),
        (["ViewLayer.Depth.Z"], [f"ViewLayer.{name}" for name in (*NORMAL, "Mist.Z", "Combined.R")]),
        (["Z"], [*BEAUTY, *NORMAL]),
        (["distance.Z"], [*BEAUTY, *NORMAL]),
        (["Depth.Z"], ["X", "Y", "Z"]),
        (["zdepth"], BEAUTY),
        (["z-depth"], [*BEAUTY, "A"]),
        (["Layer.Z_DEPTH"], BEAUTY),
        (["VRayZDepth"], BEAUTY),
        (["VRayZDepth.R", "VRayZDepth.G", "VRayZDepth.B"], BEAUTY),
        (["FinalImageWorldDepth.R", "FinalImageWorldDepth.G", "FinalImageWorldDepth.B"], [*BEAUTY, "A"]),
        (["Depth.Z"], ["Depth.ZBack", *BEAUTY]),
        (BEAUTY, ["A"]),
        (["Y"], ["A"]),
    ],
    ids=lambda names: "+".join(names),
)
def test_exr_depth_among_other_passes(tmp_path, depth, others):
    channels = {name: np.full_like(RAMP, 0.7) for name in others} | dict.fromkeys(depth, RAMP)
    path = save(tmp_path / "d.exr", exr(channels))
    np.testing.assert_array_equal(io.read_depth(path).depth, RAMP)


def test_exr_alpha_of_a_layer_is_no_depth(tmp_path):
    channels = dict.fromkeys(("WorldDepth.R", "WorldDepth.G", "WorldDepth.B"), RAMP)
    path = save(tmp_path / "d.exr", exr(channels | {"WorldDepth.A": np.ones_like(RAMP)}))
    np.testing.assert_array_equal(io.read_depth(path).depth, RAMP)


NONE_SAYS_DEPTH = "depth must be in channel Z, depth.Z, depth.V, depth, or in Y, R or another that is alone; got "


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([*BEAUTY, "N.X", "N.Y", "N.Z"], NONE_SAYS_DEPTH + "B, G, N.X, N.Y, N.Z, R"),
        (
            [*BEAUTY, "N.X", "N.Y", "N.Z", "P.X", "P.Y", "P.Z"],
            NONE_SAYS_DEPTH + "B, G, N.X, N.Y, N.Z, P.X, P.Y, P.Z, R",
        ),
        (["X", "Y", "Z"], NONE_SAYS_DEPTH + "X, Y, Z"),
        (
            [*BEAUTY, "diffuse.R", "diffuse.G", "diffuse.B"],
            NONE_SAYS_DEPTH + "B, G, R, diffuse.B, diffuse.G, diffuse.R",
        ),
        (["Y", "shadow"], NONE_SAYS_DEPTH + "Y, shadow"),
        (
            [*BEAUTY, "left.depth", "right.depth"],
            "depth must be in one channel; got left.depth, right.depth among B, G, R, left.depth, right.depth",
        ),
        (
            ["depth", "depth.V"],
            "depth must be in one channel; got depth, depth.V among depth, depth.V",
        ),
        (["Depth.X", "Depth.Y", "Depth.Z", "R"], NONE_SAYS_DEPTH + "Depth.X, Depth.Y, Depth.Z, R"),
        (
            [*BEAUTY, "VRayZDepth.R", "zdepth"],
            "depth must be in one channel; got VRayZDepth.R, zdepth among B, G, R, VRayZDepth.R, zdepth",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_exr_without_one_pass_of_depth_is_refused(tmp_path, names, message):
    # Of equal channels: the brightness of a grey picture must not pass for depth.
    path = save(tmp_path / "d.exr", exr(dict.fromkeys(names, RAMP)))
    for read in (io.read_depth_header, io.read_depth):
        with pytest.raises(InputError) as caught:
            read(path)
        assert caught.value.message == f"{path}: {message}"
        assert "rename the channel that holds depth to Z" in str(caught.value.hint)


def test_exr_layer_of_colours_called_depth_is_refused(tmp_path):
    layer = {"VRayZDepth.R": RAMP, "VRayZDepth.G": RAMP, "VRayZDepth.B": RAMP + 1}
    path = save(tmp_path / "d.exr", exr({**dict.fromkeys(BEAUTY, RAMP), **layer}))
    with pytest.raises(InputError, match=r"got different VRayZDepth\.B, VRayZDepth\.G, VRayZDepth\.R"):
        io.read_depth(path)


@pytest.mark.parametrize("compression", ["NO", "RLE", "ZIPS", "ZIP", "PIZ", "PXR24"])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_exr_flavours(tmp_path, compression, tiled, dtype):
    values = np.round(np.linspace(1, 5, 600).reshape(20, 30) * 64) / 64
    path = save(tmp_path / "d.exr", exr({"Z": values.astype(dtype)}, compression=compression, tiled=tiled))
    depth = io.read_depth(path)
    assert depth.dtype == dtype and depth.unit.name == "m"
    # PXR24 keeps 24 bits of a float, the others all.
    np.testing.assert_allclose(depth.depth, values.astype(np.float32), rtol=1e-5)


@pytest.mark.parametrize("mark", ["3.40282346638529e+38", "3.4028234663852886e+38", "-3.40282346638529e+38", "nan"])
def test_tiff_nodata_of_the_largest_float32(tmp_path, mark):
    """As GDAL writes it, which is a hair beyond the type."""
    values = RAMP.copy()
    values[1, :2] = np.clip(np.float64(mark), *np.array([-1, 1]) * np.finfo(np.float32).max)
    tifffile.imwrite(tmp_path / "d.tif", values, extratags=[(42113, "s", 0, mark, True)])
    valid = io.read_depth(tmp_path / "d.tif").valid
    assert not valid[1, :2].any() and valid.sum() == RAMP.size - 2


# How each EXIF orientation stores rows and columns, by the words of the standard: where row 0 and column 0 are.
TURNED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.T,
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].T,
    8: lambda upright: np.rot90(upright, -1),
}
# Others are none: what has them stays as it is.
TURNED |= dict.fromkeys((0, 9), TURNED[1])


def turned(path: Path, upright: np.ndarray, orientation: int) -> Path:
    """Write depth as it is stored in an orientation, and the tag that says so."""
    array = np.ascontiguousarray(TURNED[orientation](upright))
    if path.suffix == ".tif":
        tifffile.imwrite(path, array, extratags=[(274, "H", 1, orientation, True)])
    else:
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(array).save(path, exif=exif)
    return path


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize(("suffix", "dtype"), [(".tif", np.float32), (".tif", np.uint16), (".png", np.uint16)])
def test_orientation_is_applied(tmp_path, suffix, dtype, orientation):
    upright = np.rint(RAMP * 1000).astype(dtype)
    path = turned(tmp_path / f"d{suffix}", upright, orientation)
    _, header = io.read_depth_header(path)
    assert (header.width, header.height) == (4, 3)
    np.testing.assert_array_equal(io.read_stored(path)[2], upright)
    found = io.read_depth(path, unit=io.UNITS["mm"])
    np.testing.assert_allclose(found.depth, RAMP, atol=5e-4)
    # What is written fits the upright guide, and says nothing else.
    data = io.encode_depth(found.depth, dtype=found.dtype, unit=found.unit, target=found.format)
    path = save(tmp_path / f"out{suffix}", data)
    np.testing.assert_array_equal(io.read_depth(path, unit=io.UNITS["mm"]).depth, found.depth)


def test_a_png_with_odd_exif_is_taken_as_it_is_stored(tmp_path):
    values = np.rint(RAMP * 1000).astype(np.uint16)
    for exif in (b"hello", b"MM\0*\0\0\0\xff", b"II*\0\x08\0\0\0\x01\0"):
        Image.fromarray(values).save(tmp_path / "d.png", exif=exif)
        np.testing.assert_array_equal(io.read_stored(tmp_path / "d.png")[2], values)


def test_depth_and_confidence_are_turned_each_by_its_own_tag(tmp_path):
    depth = turned(tmp_path / "d.tif", RAMP, 6)
    marks = np.array([[0, 1, 2, 2], [2, 2, 2, 2], [0, 0, 0, 0]], np.uint8)
    assert cv2.imwrite(str(tmp_path / "c.png"), marks)
    np.testing.assert_array_equal(io.read_depth(depth, confidence=tmp_path / "c.png").valid, marks >= 1)


def test_png_with_a_transparent_grey(tmp_path):
    values = np.arange(1, 13, dtype=np.uint16).reshape(3, 4) * 1000
    Image.fromarray(values).save(tmp_path / "d.png", transparency=5000)
    np.testing.assert_array_equal(io.read_depth(tmp_path / "d.png").depth, values.astype(np.float32) / 1000)


def test_a_disparity_of_zero_stays_where_all_is_valid():
    values = np.array([[0.0, 0.4, 1.0, 200.0]], np.float32)
    for dtype, expected in ((np.uint8, [0, 0, 1, 200]), (np.uint16, [0, 0, 1, 200]), (np.int16, [0, 0, 1, 200])):
        data = io.encode_depth(
            values, dtype=np.dtype(dtype), unit=io.UNITS["disparity"], target=io.FORMATS["npy"], zero_is_valid=True
        )
        np.testing.assert_array_equal(np.load(stdio.BytesIO(data)), [expected])
    marked = io.encode_depth(values, dtype=np.dtype(np.uint8), unit=io.UNITS["disparity"], target=io.FORMATS["npy"])
    np.testing.assert_array_equal(np.load(stdio.BytesIO(marked)), [[1, 1, 1, 200]])


def test_exr_background_is_invalid(tmp_path):
    values = RAMP.copy()
    values[0, :4] = [np.inf, 1e10, 0, np.nan]
    path = save(tmp_path / "d.exr", exr({"Z": values}))
    np.testing.assert_array_equal(io.read_depth(path).valid, [[False] * 4, [True] * 4, [True] * 4])


@pytest.mark.parametrize("compression", ["NO"])
def test_exr_windows(tmp_path, compression):
    whole = exr({"Z": RAMP}, compression=compression)
    # A border around what was rendered.
    depth = io.read_depth(save(tmp_path / "small.exr", windows(whole, shown=(-1, -2, 4, 3))))
    expected = np.full((6, 6), np.nan, np.float32)
    expected[2:5, 1:5] = RAMP
    np.testing.assert_array_equal(depth.depth, expected)
    # More was rendered than is shown.
    depth = io.read_depth(save(tmp_path / "large.exr", windows(whole, shown=(1, 1, 2, 2))))
    np.testing.assert_array_equal(depth.depth, RAMP[1:3, 1:3])
    # Nothing that is shown was rendered.
    with pytest.raises(InputError, match="has no valid pixel"):
        io.read_depth(save(tmp_path / "none.exr", windows(whole, shown=(50, 0, 53, 2))))


@pytest.mark.parametrize("scale", [-1, 1, -0.0025, 3.5])
def test_pfm_orders(tmp_path, scale):
    path = save(tmp_path / "d.pfm", pfm(RAMP, scale=scale))
    depth = io.read_depth(path)
    np.testing.assert_array_equal(depth.depth, RAMP)
    assert depth.dtype == np.dtype("<f4" if scale < 0 else ">f4")


def test_pfm_of_opencv(tmp_path):
    assert cv2.imwrite(str(tmp_path / "d.pfm"), RAMP)
    np.testing.assert_array_equal(io.read_depth(tmp_path / "d.pfm").depth, RAMP)


def test_pfm_pixels_that_look_like_blanks(tmp_path):
    values = np.frombuffer(b"\n\r \t" * 6, "<f4").reshape(2, 3)
    np.testing.assert_array_equal(io.read_stored(save(tmp_path / "d.pfm", pfm(values)))[2], values)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pgm_of_opencv(tmp_path, dtype):
    values = np.random.default_rng(0).integers(1, np.iinfo(dtype).max, (5, 7), dtype=dtype)
    assert cv2.imwrite(str(tmp_path / "d.pgm"), values)
    assert (tmp_path / "d.pgm").read_bytes().startswith(b"P5")
    depth = io.read_depth(tmp_path / "d.pgm", unit=io.UNITS["disparity"])
    np.testing.assert_array_equal(depth.depth, values.astype(np.float32))
    assert depth.dtype == dtype


def test_pgm_with_comments_and_blanks_among_the_pixels(tmp_path):
    pixels = b"\n\r # \t\n#"
    path = save(tmp_path / "d.pgm", b"P5 # by hand\n# 9 9\n2\t2\n#\n65535\n" + pixels)
    np.testing.assert_array_equal(io.read_stored(path)[2], np.frombuffer(pixels, ">u2").reshape(2, 2))


def test_a_kinect_recording_of_nyu(tmp_path):
    # As the data set has it: PGM by its header, but the low byte first; its toolbox swaps what imread gives.
    raw = np.array([[600, 1000, 2047]], "<u2")
    path = save(tmp_path / "d-1.pgm", b"P5 3 1 65535\n" + raw.tobytes())
    depth = io.read_depth(path, unit=io.UNITS["nyu-raw"])
    np.testing.assert_allclose(depth.depth[0, :2], [351.3 / 492.5, 351.3 / 92.5], rtol=1e-6)
    assert depth.valid.tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"P5 3 1 65535\n" + bytes(5), "must be a whole PGM file of 19 bytes; got 18"),
        (b"P5 3 1 1023", "must be a whole PGM file; its first bytes are b'P5 3 1 1023'"),
        (b"P5 x", "must be a whole PGM file"),
        (b"P5 3 1 15\n" + bytes(3), "must have 8 or 16 bits per pixel; got a largest value of 15"),
        (b"P5 3 1 70000\n" + bytes(6), "must have 8 or 16 bits per pixel; got a largest value of 70000"),
        (b"P5 0 1 65535\n", "must have at least one pixel; got 0x1"),
        (b"P5 200000 200000 65535\n", "must be a whole PGM file of 80000000023 bytes; got 23"),
        (b"P6 1 1 65535\n" + bytes(6), "is not PGM by its content"),
    ],
)
def test_bad_pgm(tmp_path, data, message):
    with pytest.raises(InputError) as caught:
        io.read_depth(save(tmp_path / "d.pgm", data))
    assert message in caught.value.message


@pytest.mark.parametrize(
    "arrays",
    [
        {"depth": RAMP, "conf": np.ones((5, 5))},
        {"anything": RAMP},
        {"depth": np.asfortranarray(RAMP)},
        {"depth": RAMP.astype(">f8")},
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_npz_keys_and_orders(tmp_path, arrays, compressed):
    path = save(tmp_path / "d.npz", npz(compressed=compressed, **arrays))
    np.testing.assert_array_equal(io.read_depth(path).depth, RAMP)


@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 4, 1), (1, 1, 3, 4), (1, 3, 4, 1), (1, 1, 12), (12, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["npy", "npz", "npz stored"])
def test_numpy_axes_of_length_1_are_left_out(tmp_path, kind, order, shape):
    values = RAMP.ravel()[: int(np.prod(shape))]
    rows, columns = {(1, 1, 12): (1, 12), (12, 1, 1): (12, 1), (1, 1, 1): (1, 1)}.get(shape, (3, 4))
    array = np.asarray(values.reshape(shape), order=order)
    data = npy(array) if kind == "npy" else npz(depth=array, compressed=kind == "npz")
    path = save(tmp_path / f"d.{kind[:3]}", data)
    _, header = io.read_depth_header(path)
    assert (header.width, header.height) == (columns, rows)
    np.testing.assert_array_equal(io.read_depth(path).depth, values.reshape(rows, columns))


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((2, 5, 6), "save one map: depth[0]"),
        ((5, 6, 2), "save one map: depth[..., 0]"),
        ((4, 1, 5, 6), "save one map: depth[0, 0]"),
        ((1, 2, 5, 6), "save one map: depth[0, 0]"),
        ((2, 5, 6, 3), "save one map: depth[0, ..., 0]"),
        ((5, 1, 6), "save it as rows and columns: np.squeeze(depth)"),
        ((1, 12, 1), "save it as rows and columns: depth.reshape(rows, columns)"),
        ((12,), "save it as rows and columns: depth.reshape(rows, columns)"),
        ((), "save it as rows and columns: depth.reshape(rows, columns)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_numpy_shapes_of_no_one_map_are_refused(tmp_path, suffix, shape, hint):
    path = save(tmp_path / f"d.{suffix}", {"npy": npy, "npz": lambda array: npz(depth=array)}[suffix](np.ones(shape)))
    with pytest.raises(InputError) as caught:
        io.read_depth(path)
    assert caught.value.message == f"{path}: depth must have 2 dimensions (rows, columns); got shape {shape}"
    assert caught.value.hint == hint


@pytest.mark.parametrize("name", ["png", "tiff", "exr", "npz"])
def test_notes_come_back(tmp_path, name):
    dtype = np.dtype(np.uint16 if name == "png" else np.float32)
    notes = {"model": "bäse", "weights_sha256": "ab12"}
    data = io.encode_depth(RAMP, dtype=dtype, unit=io.UNITS["mm"], target=io.FORMATS[name], notes=notes)
    found = io.read_notes(save(tmp_path / f"d{io.FORMATS[name].suffixes[0]}", data))
    expected = {"unit": "mm", "model": "bäse", "weights_sha256": "ab12", "units_per_metre": "1000"}
    assert {key.removeprefix("ddfup:"): text for key, text in found.items() if key.startswith("ddfup:")} == expected


def test_exr_notes_are_in_the_header(tmp_path):
    data = io.encode_depth(
        RAMP, dtype=np.dtype(np.float32), unit=io.UNITS["m"], target=io.FORMATS["exr"], notes={"model": "m"}
    )
    with OpenEXR.File(str(save(tmp_path / "d.exr", data))) as file:
        header = dict(file.header())
    assert header["ddfup:unit"] == "m" and header["ddfup:model"] == "m"


@pytest.mark.parametrize("name", io.FORMATS)
def test_the_same_depth_gives_the_same_bytes(name):
    dtype = np.dtype(np.uint16 if name in ("png", "pgm") else np.float32)
    first, second = (
        io.encode_depth(RAMP, dtype=dtype, unit=io.UNITS["mm"], target=io.FORMATS[name], notes={"model": "m"})
        for _ in range(2)
    )
    assert first == second


# --- confidence ---


def test_confidence(tmp_path):
    depth = save(tmp_path / "d.npz", npz(depth=RAMP))
    marks = np.array([[0, 1, 2, 2]] * 3, np.uint8)
    path = tmp_path / "c.png"
    assert cv2.imwrite(str(path), marks)
    for least, expected in ((0, marks >= 0), (1, marks >= 1), (2, marks >= 2)):
        found = io.read_depth(depth, confidence=path, min_confidence=least)
        np.testing.assert_array_equal(found.valid, expected)
        np.testing.assert_array_equal(found.depth[expected], RAMP[expected])
    np.testing.assert_array_equal(io.read_depth(depth, confidence=path).valid, marks >= 1)
    assert cv2.imwrite(str(path), marks * 0)
    with pytest.raises(InputError, match=r"no valid pixel.*or confidence below 1"):
        io.read_depth(depth, confidence=path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((4, 4), np.uint8), "must have the size of its depth = 4x3; got 4x4"),
        (np.full((3, 4), 255, np.uint8), "confidence must be 0, 1 or 2; got 255 to 255"),
        (np.full((3, 4), -1, np.int8), "confidence must be 0, 1 or 2; got -1 to -1"),
        (np.ones((3, 4), np.float32), "confidence must be integers 0, 1 and 2; got float32"),
    ],
)
def test_bad_confidence(tmp_path, array, message):
    depth = save(tmp_path / "d.npz", npz(depth=RAMP))
    path = save(tmp_path / "c.npz", npz(depth=array))
    with pytest.raises(InputError) as caught:
        io.read_depth(depth, confidence=path)
    assert message in caught.value.message and str(path) in caught.value.message


# --- files without a header ---


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
def test_raw_depth_and_confidence(tmp_path, packed, dtype):
    pack = imagecodecs.lzfse_encode if packed else bytes
    values = np.round(RAMP * 64) / 64
    depth = save(tmp_path / "0.depth", pack(values.astype(dtype).tobytes()))
    confidence = save(tmp_path / "0.conf", pack(bytes([0, 1, 2, 2] * 3)))
    found = io.read_depth(depth, raw=(4, 3), confidence=confidence, min_confidence=2)
    assert found.dtype == np.dtype(dtype) and found.unit.name == "m"
    np.testing.assert_array_equal(found.valid, [[False, False, True, True]] * 3)
    np.testing.assert_array_equal(found.depth[found.valid], values[found.valid])
    # Files that have a header are read by it.
    np.testing.assert_array_equal(io.read_depth(save(tmp_path / "d.pfm", pfm(RAMP)), raw=(9, 9)).depth, RAMP)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes(47), "raw 4x3 must have 1, 2 or 4 bytes per pixel; got 47 bytes = 3.91667"),
        (bytes(500), "raw 4x3 must have 1, 2 or 4 bytes per pixel; got 500 bytes"),
        (imagecodecs.lzfse_encode(bytes(range(60))), "raw 4x3 must have 1, 2 or 4 bytes per pixel; got 49 bytes"),
        (imagecodecs.lzfse_encode(RAMP.tobytes())[:20], "0.depth: "),
        (bytes(48), "has no valid pixel"),
        (bytes(12), "8-bit depth has no usual unit"),
    ],
)
def test_bad_raw_depth(tmp_path, data, message):
    with pytest.raises(InputError) as caught:
        io.read_depth(save(tmp_path / "0.depth", data), raw=(4, 3))
    assert message in caught.value.message


def test_raw_depth_of_a_named_type(tmp_path):
    millimetres = np.array([[1000, 0, 3000, 65535]] * 3, "<u2")
    depth = save(tmp_path / "d.raw", millimetres.tobytes())
    confidence = save(tmp_path / "c.raw", bytes([2, 2, 2, 0] * 3))
    raw = io.parse_size("4x3:u16")
    found = io.read_depth(depth, raw=raw, confidence=confidence)
    assert found.dtype == np.uint16 and found.unit.name == "mm"
    np.testing.assert_array_equal(found.depth, np.array([[1, np.nan, 3, np.nan]] * 3, np.float32))
    for text, message in (
        ("4x3:f32", "raw 4x3:f32 must have 4 bytes per pixel; got 24 bytes = 2"),
        ("4x3:u8", "got 24"),
    ):
        with pytest.raises(InputError) as caught:
            io.read_depth(depth, raw=io.parse_size(text), unit=io.UNITS["disparity"])
        assert message in caught.value.message
    with pytest.raises(ArgumentError, match="type must be one of u8, u16, f16, f32; got 'i16'"):
        io.parse_size("4x3:i16")


@pytest.mark.parametrize("text", ["256", "256x", "0x4", "-1x4", "256x192x3", "1e3x4", "9999999x1"])
def test_wrong_raw_sizes(text):
    with pytest.raises(ArgumentError, match="must be WIDTHxHEIGHT"):
        io.parse_size(text)
    assert io.parse_size("256X192") == (256, 192)
