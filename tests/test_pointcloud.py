"""Points, cameras, flying pixels, and the options of `ddfup upsample` that need them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddfup import cli, inference, pointcloud
from ddfup.errors import ArgumentError, InputError
from ddfup.pointcloud import Camera, PointCloud

CLOUD = Path("c.ply")


def read_ply(data: bytes) -> tuple[np.ndarray, list[str]]:
    """Read a PLY file as its three-page description says, with no help from the project."""
    head, body = data.split(b"end_header\n", 1)
    lines = head.decode("ascii").split("\n")[:-1]
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    codes = {"float": "<f4", "uchar": "u1"}
    fields = [(line.split()[2], codes[line.split()[1]]) for line in lines if line.startswith("property ")]
    (count,) = [int(line.split()[2]) for line in lines if line.startswith("element vertex ")]
    dtype = np.dtype(fields)
    assert len(body) == count * dtype.itemsize
    return np.frombuffer(body, dtype), [name for name, _ in fields]


# --- points ---


@pytest.mark.parametrize("deep", [False, True])
def test_points_lie_on_the_rays_of_their_pixels(deep):
    rng = np.random.default_rng(0)
    depth = rng.uniform(0.5, 4, (5, 7)).astype(np.float32)
    depth[1, 2], depth[2, 3], depth[3, 4], depth[4, 5] = np.nan, np.inf, 0, -1
    guide = rng.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    camera = Camera(6.0, 5.0, 2.5, 1.5)
    given = guide.astype(np.uint16) * 257 if deep else guide
    cloud, names = read_ply(pointcloud.encode_ply(pointcloud.find_points(depth, given, camera)))
    assert names == ["x", "y", "z", "red", "green", "blue"]
    expected = []
    for row in range(5):
        for column in range(7):
            z = float(depth[row, column])
            if math.isfinite(z) and z > 0:
                expected.append(((column - 2.5) / 6 * z, (row - 1.5) / 5 * z, z, *guide[row, column].tolist()))
    assert cloud.size == len(expected) == 31
    for point, wanted in zip(cloud, expected, strict=True):
        assert point.tolist()[:3] == pytest.approx(wanted[:3], rel=1e-6, abs=1e-7)
        assert point.tolist()[3:] == wanted[3:]


def test_a_cloud_of_nothing():
    nothing = np.full((3, 4), np.nan, np.float32)
    cloud, _ = read_ply(
        pointcloud.encode_ply(pointcloud.find_points(nothing, np.zeros((3, 4, 3), np.uint8), Camera(1, 1, 0, 0)))
    )
    assert cloud.size == 0


# --- flying pixels ---


def test_pixels_between_near_and_far_fly():
    depth = np.full((6, 9), 1.0, np.float32)
    depth[:, 3:5] = [1.5, 2.2]  # a ramp of interpolated pixels
    depth[:, 5:] = 3.0
    flying = pointcloud.flying(depth)
    assert flying[:, 3:5].all() and flying.sum() == 12
    np.testing.assert_array_equal(pointcloud.flying(depth.T), flying.T)


def test_what_is_thin_slanted_or_at_a_hole_stays():
    wire = np.full((8, 9), 3.0, np.float32)
    wire[:, 4] = 1.0
    assert not pointcloud.flying(wire).any()
    # A floor seen by a camera of 300 pixels: 1.6 % per row at most.
    floor = np.repeat(300 / np.arange(60.0, 160)[::-1, None], 9, axis=1).astype(np.float32)
    assert not pointcloud.flying(floor).any()
    step = np.where(np.arange(9) < 4, 1.0, 3.0).astype(np.float32)[None].repeat(5, axis=0)
    assert not pointcloud.flying(step).any(), "a sharp edge has no pixel between"
    step[:, 5] = np.nan
    assert not pointcloud.flying(step).any()


def test_a_lone_pixel_flies():
    depth = np.full((5, 5), 3.0, np.float32)
    depth[2, 2] = 1.0
    expected = np.zeros((5, 5), bool)
    expected[2, 2] = True
    np.testing.assert_array_equal(pointcloud.flying(depth), expected)
    np.testing.assert_array_equal(pointcloud.flying(1 / depth), expected)


def test_a_single_pixel_does_not_fly():
    assert not pointcloud.flying(np.ones((1, 1), np.float32)).any()


# --- cameras ---


def test_ways_to_give_a_camera(tmp_path):
    assert PointCloud(CLOUD, fx=50).camera(64, 48) == Camera(50, 50, 31.5, 23.5)
    assert PointCloud(CLOUD, fx=50, fy=60, cx=1, cy=2).camera(64, 48) == Camera(50, 60, 1, 2)
    camera = PointCloud(CLOUD, fov=90).camera(64, 48)
    # The outer edges of the picture, half a pixel beyond the outer centres, are 45 degrees off the axis.
    assert (-0.5 - camera.cx) / camera.fx == pytest.approx(-1) and camera.fy == camera.fx and camera.cy == 23.5
    path = tmp_path / "k.json"
    for content in (
        {"fx": 50, "fy": 60, "cx": 1, "cy": 2},
        {"K": [[50, 0, 1], [0, 60, 2], [0, 0, 1]], "width": 64, "height": 48},
        {"intrinsics": [50, 0, 1, 0, 60, 2, 0, 0, 1], "other": "text"},
    ):
        path.write_text(json.dumps(content))
        assert PointCloud(CLOUD, file=path).camera(64, 48) == Camera(50, 60, 1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one camera: --fx, --intrinsics or --fov; got none"),
        ({"fx": 50, "fov": 60}, "got --fx and --fov"),
        ({"cy": 50, "file": Path("x")}, "got --fx and --intrinsics"),
        ({"cx": 50}, "--fy, --cx and --cy must come with --fx"),
        ({"fx": 0}, "--fx must be a positive number of pixels; got 0"),
        ({"fx": 1, "fy": -2}, "--fy must be a positive number of pixels; got -2"),
        ({"fx": 1, "cx": math.inf}, "--cx must be a number of pixels; got inf"),
        ({"fov": 180}, "--fov must be between 0 and 180 degrees; got 180"),
        ({"fov": math.nan}, "--fov must be between 0 and 180"),
        ({"path": Path("c.obj"), "fov": 60}, "--pointcloud must end in .ply; got 'c.obj'"),
    ],
)
def test_wrong_cameras(options, message):
    with pytest.raises(ArgumentError) as caught:
        PointCloud(**{"path": CLOUD, **options}).camera(64, 48)
    assert message in caught.value.message


def test_a_byte_order_mark_is_no_part_of_a_camera(tmp_path):
    path = tmp_path / "k.json"
    path.write_text('{"fx": 1, "fy": 2, "cx": 3, "cy": 4, "width": 64}', "utf-8-sig")
    assert pointcloud.read_camera(path, 64, 48) == Camera(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a JSON file"),
        ("{", "must be a JSON file"),
        ("[1]", "must be a JSON object; got list"),
        ("[" * 5000, "must be a JSON file"),
        ('{"fx": 1}', "must hold fx, fy, cx, cy or a 3x3 matrix"),
        ('{"fx": "a", "fy": 1, "cx": 1, "cy": 1}', "must hold fx, fy, cx, cy"),
        ('{"fx": 0, "fy": 1, "cx": 1, "cy": 1}', "fx must be a positive number of pixels; got 0"),
        ('{"fx": NaN, "fy": 1, "cx": 1, "cy": 1}', "fx must be a positive number of pixels; got nan"),
        ('{"K": [1, 2, 3]}', "must hold fx, fy, cx, cy or a 3x3 matrix"),
        ('{"K": [[5, 0, 0], [0, 5, 0], [3, 2, 1]]}', "the matrix must be [fx, 0, cx]"),
        ('{"K": [[5, 1, 3], [0, 5, 2], [0, 0, 1]]}', "must have no skew; got 1"),
        (
            '{"fx": 1, "fy": 1, "cx": 1, "cy": 1, "width": 640}',
            "width must be that of the guide, the number 64; got 640",
        ),
        ('{"fx": 1, "fy": 1, "cx": 1, "cy": 1, "width": "64"}', "that of the guide, the number 64; got '64'"),
        (None, "must be readable"),
    ],
)
def test_wrong_camera_files(tmp_path, text, message):
    path = tmp_path / "k.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as caught:
        pointcloud.read_camera(path, 64, 48)
    assert message in caught.value.message and str(path) in caught.value.message


# --- the command ---


class Enlarger:
    """Stands in for a network."""

    model_name, weights_sha256, device, kernels = "nearest", "5eed", "cpu", "torch"

    def __init__(self, model, *, device, precision, tile):
        pass

    def __call__(self, depth, guide, *, valid=None, fill=False):
        return np.where(valid, depth, np.nan).astype(np.float32).repeat(4, axis=0).repeat(4, axis=1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    values = np.arange(1000, 1048, dtype=np.uint16).reshape(6, 8)
    values[2, 3] = 0
    Image.fromarray(values).save(tmp_path / "depth.png")
    Image.fromarray(np.full((24, 32, 3), (90, 80, 70), np.uint8)).save(tmp_path / "guide.png")
    marks = np.full((6, 8), 2, np.uint8)
    marks[0, 0], marks[0, 1] = 0, 1
    Image.fromarray(marks).save(tmp_path / "conf.png")
    monkeypatch.setattr(inference, "Upsampler", Enlarger)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capfd):
    def call(*arguments):
        code = cli.main(["upsample", "depth.png", "guide.png", *map(str, arguments)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def test_upsample_writes_points(folder, run):
    code, out, err = run("--pointcloud", "c.ply", "--fov", "60", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["pointcloud"] == "c.ply" and record["points"] == 47 * 16
    assert "wrote c.ply: 752 points\n" in err
    cloud, _ = read_ply(Path("c.ply").read_bytes())
    assert cloud.size == 752 and set(cloud["red"]) == {90} and cloud["z"].min() == pytest.approx(1.0)
    code, _, err = run("--pointcloud", "c.ply", "--fov", "60", "-o", "other.png")
    assert code == 6 and "c.ply: must not exist yet; it does" in err and not Path("other.png").exists()


def test_clean_edges_reaches_the_points(folder, run, monkeypatch):
    def mixed(self, depth, guide, *, valid, fill):
        columns = np.full(32, 1.0, np.float32)
        columns[16:18], columns[18:] = [1.7, 2.4], 3.0
        return columns[None].repeat(24, axis=0)

    monkeypatch.setattr(Enlarger, "__call__", mixed)
    assert run("--pointcloud", "a.ply", "--fx", "40")[0] == 0
    assert run("--pointcloud", "b.ply", "--fx", "40", "--clean-edges", "--overwrite")[0] == 0
    (all_points, _), (clean, _) = (read_ply(Path(name).read_bytes()) for name in ("a.ply", "b.ply"))
    assert all_points.size == 32 * 24 and clean.size == 30 * 24
    assert set(np.round(clean["z"], 3)) == {1.0, 3.0}


@pytest.mark.parametrize(
    ("arguments", "expected", "message"),
    [
        (["--pointcloud", "c.ply"], 2, "--pointcloud must have one camera"),
        (["--fov", "60"], 2, "must come with --pointcloud"),
        (["--clean-edges"], 2, "must come with --pointcloud"),
        (["--pointcloud", "c.ply", "--fov", "60", "--unit", "disparity"], 2, "must have depth in metres"),
        (["--pointcloud", "no/c.ply", "--fov", "60"], 6, "its folder must exist"),
        (["--pointcloud", "c.ply", "--intrinsics", "none.json"], 4, "none.json: must be readable"),
        (["--pointcloud", "c.ply", "--fov", "60", "--preview", "c.ply"], 2, "a picture must be .png or .jpg"),
        (["--confidence", "none.png"], 4, "none.png: must exist"),
        (["--confidence", "guide.png"], 4, "depth must have one channel"),
        (["--confidence", "depth.png"], 4, "confidence must be 0, 1 or 2; got 0 to 1047"),
        (["--confidence", "conf.png", "-o", "conf.png", "--overwrite"], 6, "must not replace an input"),
        (["--confidence", "conf.png", "--min-confidence", "3"], 2, "--min-confidence"),
        (["--min-confidence", "2"], 2, "--min-confidence must come with --confidence; it is missing"),
    ],
)
def test_refusals(folder, run, arguments, expected, message):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, out, err = run(*arguments)
    assert (code, out) == (expected, "") and err.startswith("error: ") and message in err.splitlines()[0]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_confidence_makes_holes(folder, run):
    assert run("--confidence", "conf.png", "-o", "a.png")[0] == 0
    assert run("--confidence", "conf.png", "--min-confidence", "2", "-o", "b.png")[0] == 0
    first, second = (np.array(Image.open(name))[::4, ::4] for name in ("a.png", "b.png"))
    assert first[0, :3].tolist() == [0, 1001, 1002] and second[0, :3].tolist() == [0, 0, 1002]


def test_raw_depth(folder, run):
    depth = np.arange(1.0, 49.0, dtype=np.float32).reshape(6, 8)
    Path("0.depth").write_bytes(depth.tobytes())
    Path("0.conf").write_bytes(bytes([2] * 24 + [0] * 24))
    arguments = ["upsample", "0.depth", "guide.png", "--confidence", "0.conf", "--raw"]
    assert cli.main([*arguments, "8x6"]) == 0
    result = np.load("0_up.npy")[::4, ::4]
    np.testing.assert_array_equal(result[:3], depth[:3])
    assert np.isnan(result[3:]).all()
    assert cli.main([*arguments, "8x6", "--format", "exr"]) == 0 and Path("0_up.exr").is_file()
    assert cli.main([*arguments, "8x7", "--overwrite"]) == 4
    assert cli.main([*arguments, "eight", "--overwrite"]) == 2
