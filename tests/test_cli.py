"""The command line with a stand-in for the network: options, files, messages, exit codes."""

import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import ddfup
from ddfup import cli, inference, models, options, pair
from ddfup.errors import DeviceError, OutputError
from ddfup.ops import compilers, native

CHECKOUT = Path(ddfup.__file__).resolve().parent.parent
KEYS = [
    *("depth", "guide", "out", "status", "error", "width", "height", "factor", "model", "device", "kernels"),
    *("seconds", "valid_fraction"),
]


class NearestUpsampler:
    """Enlarges without a network, so that every expected pixel is known."""

    model_name = "nearest"
    weights_sha256 = "5eed"
    device = "cpu"
    kernels = "torch"
    made: ClassVar[list[tuple]] = []

    def __init__(self, model, *, device, precision, tile):
        self.made.append((model, device, precision, tile))

    def __call__(self, depth, guide, *, valid=None, fill=False):
        height, width = guide.shape[:2]
        rows = np.arange(height) * depth.shape[0] // height
        columns = np.arange(width) * depth.shape[1] // width
        filled = np.where(valid, depth, np.float32(2.0) if fill else np.nan).astype(np.float32)
        return filled[np.ix_(rows, columns)]


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(NearestUpsampler, "made", [])
    monkeypatch.setattr(inference, "Upsampler", NearestUpsampler)
    return NearestUpsampler


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a 8x6 depth (one hole) and a 32x24 guide, and nothing else."""
    values = np.arange(1000, 1048, dtype=np.uint16).reshape(6, 8)
    values[2, 3] = 0
    Image.fromarray(values).save(tmp_path / "depth.png")
    Image.fromarray(np.full((24, 32, 3), 90, np.uint8)).save(tmp_path / "guide.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capfd):
    def call(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def tree(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def large(values):
    return np.repeat(np.repeat(values, 4, axis=0), 4, axis=1)


def shell(*arguments, code="from ddfup.cli import main; import sys; sys.exit(main())", **settings):
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), **settings.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        env=environment,
        timeout=120,
        **settings,
    )


DRIVER = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import test_cli, ddfup.inference
ddfup.inference.Upsampler = test_cli.NearestUpsampler
from ddfup.cli import main
"""


# --- what it writes ---


def test_upsample_writes_beside_the_depth(folder, fake, run):
    before = tree(folder)
    code, out, err = run("upsample", "depth.png", "guide.jpg")
    assert (code, out) == (0, "")
    assert re.fullmatch(r"wrote depth_up\.png: 32x24 \(x4\), 97\.9% valid, nearest on cpu .* s\n", err)
    with Image.open("depth_up.png") as picture:
        np.testing.assert_array_equal(np.array(picture), large(np.array(Image.open("depth.png"))))
        assert picture.text["ddfup:unit"] == "mm"
        assert picture.text["ddfup:model"] == "nearest"
        assert picture.text["ddfup:weights_sha256"] == "5eed"
    after = tree(folder)
    assert set(after) - set(before) == {"depth_up.png"}
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    ("typed", "expected"), [("ddfup up", ["upsample"]), ("ddfup upsample --min", ["--min-confidence"])]
)
def test_shells_complete_commands_and_options(monkeypatch, capfd, typed, expected):
    monkeypatch.setenv("_DDFUP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    assert cli.main([]) == 0
    assert capfd.readouterr().out.split() == expected


def test_json_is_one_object_with_the_promised_keys(folder, fake, run):
    code, out, err = run("upsample", "depth.png", "guide.jpg", "--json", "-q", "-o", "r.png")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert list(record) == KEYS
    assert {key: record[key] for key in KEYS[:11]} == {
        "depth": "depth.png",
        "guide": "guide.jpg",
        "out": "r.png",
        "status": "ok",
        "error": None,
        "width": 32,
        "height": 24,
        "factor": 4.0,
        "model": "nearest",
        "device": "cpu",
        "kernels": "torch",
    }
    assert record["seconds"] > 0 and record["valid_fraction"] == pytest.approx(47 / 48)


def test_options_reach_the_network(folder, fake, run):
    arguments = ("--model", "m.safetensors", "--device", "cuda:1", "--precision", "bf16", "--tile", "1024")
    assert run("upsample", "depth.png", "guide.jpg", *arguments)[0] == 0
    assert run("upsample", "depth.png", "guide.jpg", "--overwrite")[0] == 0
    assert fake.made == [
        ("m.safetensors", "cuda:1", "bf16", 1024),
        (models.DEFAULT_MODEL, "auto", "auto", "auto"),
    ]


def test_fill_gives_depth_to_holes(folder, fake, run):
    assert run("upsample", "depth.png", "guide.jpg", "--fill", "-o", "filled.png")[0] == 0
    values = np.array(Image.open("filled.png"))
    assert (values[8:12, 12:16] == 2000).all() and (values > 0).all()


@pytest.mark.parametrize(
    ("arguments", "name", "dtype"),
    [
        (("--format", "npy"), "depth_up.npy", np.uint16),
        (("--format", "tiff"), "depth_up.tif", np.uint16),
        (("-o", "r.TIFF"), "r.TIFF", np.uint16),
        (("-o", "r.npy", "--format", "npy"), "r.npy", np.uint16),
    ],
)
def test_output_formats(folder, fake, run, arguments, name, dtype):
    assert run("upsample", "depth.png", "guide.jpg", *arguments)[0] == 0
    values = np.load(name) if name.endswith("npy") else tifffile.imread(name)
    assert values.dtype == dtype
    np.testing.assert_array_equal(values, large(np.array(Image.open("depth.png"))))


def test_floats_stay_metres_and_mark_holes_with_nan(folder, fake, run):
    depth = np.linspace(1, 9, 48, dtype=np.float64).reshape(6, 8)
    depth[0, 0] = np.inf
    np.save("depth.npy", depth)
    assert run("upsample", "depth.npy", "guide.jpg")[0] == 0
    values = np.load("depth_up.npy")
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, large(np.where(np.isfinite(depth), depth, np.nan)), rtol=1e-6)
    assert run("upsample", "depth.npy", "guide.jpg", "--format", "png")[0] == 0
    stored = np.array(Image.open("depth_up.png"))
    assert stored.dtype == np.uint16 and stored[0, 0] == 0
    np.testing.assert_allclose(stored[1:, 4:], values[1:, 4:] * 1000, atol=0.5)


def test_8_bit_disparity(folder, fake, run):
    values = np.arange(200, 248, dtype=np.uint8).reshape(6, 8)
    Image.fromarray(values).save("disparity.png")
    code, _, err = run("upsample", "disparity.png", "guide.jpg")
    assert code == 4 and "8-bit depth has no usual unit" in err and "hint: " in err
    assert run("upsample", "disparity.png", "guide.jpg", "--unit", "disparity")[0] == 0
    np.testing.assert_array_equal(np.array(Image.open("disparity_up.png")), large(values))


@pytest.mark.parametrize("hole", [False, True])
def test_a_disparity_of_zero_is_kept_unless_zero_marks_holes(folder, fake, run, hole):
    values = np.arange(48, dtype=np.uint8).reshape(6, 8)
    values[5, 7] = 99 if hole else 47
    Image.fromarray(values).save("disparity.png")
    assert run("upsample", "disparity.png", "guide.jpg", "--unit", "disparity", "--invalid", "99")[0] == 0
    stored = np.array(Image.open("disparity_up.png"))
    expected = large(np.where(values == 99, 0, np.maximum(values, 1)) if hole else values)
    np.testing.assert_array_equal(stored, expected)


@pytest.mark.parametrize(("mark", "told"), [(65535, True), (65534, False)])
def test_the_largest_value_of_a_type_is_pointed_at(folder, fake, run, mark, told):
    values = np.array(Image.open("depth.png"))
    values[0, :2] = mark
    Image.fromarray(values).save("depth.png")
    code, _, err = run("upsample", "depth.png", "guide.jpg")
    assert code == 0
    note = "2 low-resolution pixels have the largest value of uint16, 65535: if that means no measurement, say"
    assert (note in " ".join(err.split())) == told


def test_unit_and_invalid_are_understood(folder, fake, run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        fake, "__call__", lambda self, depth, guide, valid, fill: seen.append((depth, valid)) or large(depth)
    )
    code, _, err = run("upsample", "depth.png", "guide.jpg", "--unit", "tum", "--invalid", "0,1001")
    assert code == 0, err
    depth, valid = seen[0]
    assert valid[0, 0] and not valid[0, 1] and not valid[2, 3]
    assert depth[0, 2] == pytest.approx(1002 / 5000)
    assert np.array(Image.open("depth_up.png"))[0, 8] == 1002


def test_overshoot_is_limited_and_said(folder, fake, run, monkeypatch):
    monkeypatch.setattr(fake, "__call__", lambda self, depth, guide, valid, fill: large(depth) + 64.53)
    code, _, err = run("upsample", "depth.png", "guide.jpg")
    assert code == 0 and "pixels came out above what uint16 holds and were limited to 65.535 m" in err
    assert np.array(Image.open("depth_up.png")).max() == 65535


def test_no_depth_comes_out_at_or_behind_the_camera(folder, fake, run, monkeypatch):
    given = np.array(Image.open("depth.png"))
    nearest = given[given > 0].min()
    monkeypatch.setattr(fake, "__call__", lambda self, depth, guide, valid, fill: large(depth) - nearest / 1000)
    code, _, err = run("upsample", "depth.png", "guide.jpg")
    assert code == 0 and "came out below the smallest depth of uint16, 0.001 m, and were set to " in err
    result, expected = np.array(Image.open("depth_up.png")).astype(int), large(given).astype(int) - nearest
    expected[expected == 0] = nearest
    np.testing.assert_array_equal(result[large(given) > 0], expected[large(given) > 0])


def test_stdout_gets_the_file(folder, fake):
    code = DRIVER + "sys.exit(main())"
    done = shell(Path(__file__).parent, "upsample", "depth.png", "guide.jpg", "-o", "-", code=code)
    assert done.returncode == 0, done.stderr
    (folder / "x.png").write_bytes(done.stdout)
    np.testing.assert_array_equal(np.array(Image.open("x.png")), large(np.array(Image.open(folder / "depth.png"))))
    assert b"wrote -: 32x24" in done.stderr


def test_preview_is_a_picture_of_three_panels(folder, fake, run):
    assert run("upsample", "depth.png", "guide.jpg", "--preview", "p.png")[0] == 0
    with Image.open("p.png") as picture:
        assert picture.mode == "RGB" and picture.width > 3 * picture.height
    code, _, err = run("upsample", "depth.png", "guide.jpg", "-o", "q.png", "--preview", "p.gif")
    assert code == 2 and "a picture must be .png or .jpg; got 'p.gif'" in err
    code, _, err = run("upsample", "depth.png", "guide.jpg", "-o", "q.png", "--preview", "p.png")
    assert code == 6 and "p.png: must not exist yet" in err
    assert not Path("q.png").exists()


def test_dry_run_writes_nothing(folder, fake, run, monkeypatch):
    monkeypatch.setattr(models, "find_model", lambda name: models.ModelInfo("m", "a", folder, 1, "0", "", {}))
    before = tree(folder)
    code, out, err = run("upsample", "depth.png", "guide.jpg", "-n", "--json")
    assert code == 0 and tree(folder) == before and fake.made == []
    assert err == "would write depth_up.png: 32x24 (x4)\n"
    assert json.loads(out)["dry_run"] is True


def test_existing_output(folder, fake, run):
    Path("depth_up.png").write_bytes(b"precious")
    code, _, err = run("upsample", "depth.png", "guide.jpg")
    assert code == 6
    assert err.splitlines() == [
        "error: depth_up.png: must not exist yet; it does",
        "hint: --overwrite replaces it, or give another name",
    ]
    code, out, _ = run("upsample", "depth.png", "guide.jpg", "--skip-existing", "--json")
    assert code == 0 and json.loads(out)["status"] == "skipped"
    assert Path("depth_up.png").read_bytes() == b"precious"
    assert run("upsample", "depth.png", "guide.jpg", "--overwrite")[0] == 0
    assert Path("depth_up.png").read_bytes() != b"precious"


@pytest.mark.parametrize("kind", ["name", "dots", "hard link", "symbolic link", "guide", "preview"])
def test_an_input_is_never_replaced(folder, fake, run, kind):
    out = {"name": "depth.png", "dots": "../" + folder.name + "/depth.png", "guide": "guide.jpg"}.get(kind, "link.png")
    if kind == "hard link":
        os.link("depth.png", out)
    elif kind == "symbolic link":
        Path(out).symlink_to("depth.png")
    before = tree(folder)
    given = ("--preview", "guide.jpg") if kind == "preview" else ("-o", out)
    code, _, err = run("upsample", "depth.png", "guide.jpg", "--overwrite", *given)
    assert code == 6 and "an output must not replace an input" in err
    assert tree(folder) == before


@pytest.mark.parametrize("arguments", [("-o", "a" * 300 + ".png"), ("--preview", "a" * 300 + ".png"), ()])
def test_names_that_no_file_can_have(folder, fake, run, arguments):
    depth = "depth.png" if arguments else "a" * 250 + ".png"
    Path("depth.png").rename(depth)
    before = tree(folder)
    for more in ((), ("--skip-existing",)):
        code, _, err = run("upsample", depth, "guide.jpg", *arguments, *more)
        assert code == 6 and "an output must have a name that its folder takes; got File name too long" in err
        assert err.startswith("error: aaa") and "\nhint: give a shorter name with -o" in err
    assert tree(folder) == before and fake.made == []


@pytest.mark.parametrize("side", ["1", "7", "47"])
def test_tiles_that_no_network_can_use(folder, fake, run, side):
    code, _, err = run("upsample", "depth.png", "guide.jpg", "--tile", side)
    assert code == 2 and err == f"error: --tile must be at least 48 pixels; got {side}\nhint: try --tile 1024\n"


def test_the_least_tile_refuses_none_that_works():
    for info in models.list_models():
        network = models.load_model(info.path)
        if isinstance(network, inference.Tileable):
            grids = [network.tile_grid(ratio) for ratio in range(1, 33)]
            assert min(2 * halo + multiple for multiple, halo in grids) >= options.LEAST_TILE


def test_tiles_too_small_for_a_network_name_their_option(folder, run):
    save_rgb("large.png", (128, 96))
    code, out, err = run("upsample", "depth.png", "large.png", "--tile", "64", "--device", "cpu", "--json")
    message = "--tile must be larger than twice the overlap of 40 pixels; got 64"
    assert code == 2 and err == f"error: {message}\nhint: use at least --tile 112\n"
    assert json.loads(out)["error"] == message
    code = run("upsample", "depth.png", "large.png", "--tile", "112", "--device", "cpu", "-q")
    assert code == (0, "", "")


def test_odd_names(folder, fake, run):
    name = "tiefe mit ümlaut [b]x[red] 深度\n.png"
    Path("depth.png").rename(name)
    code, out, err = run("upsample", name, "guide.jpg", "--json")
    assert code == 0 and json.loads(out)["depth"] == name
    assert err.count("\n") == 1 and "[b]x[red] 深度\\n_up.png" in err
    Path(name).rename("-d.png")
    assert run("upsample", "--", "-d.png", "guide.jpg")[0] == 0
    assert Path("-d_up.png").is_file()


def test_config_file_gives_defaults_and_flags_win(folder, fake, run):
    Path("c.toml").write_text(
        'precision = "bf16"\ninvalid = [0, 1001]\noverwrite = true\njson = true\nmax-pixels = 768\n'
        "[upsample]\ntile = 512\n[demo]\ntile = 256\n"
    )
    assert run("upsample", "depth.png", "guide.jpg", "--config", "c.toml", "--precision", "fp32")[0] == 0
    assert fake.made == [(models.DEFAULT_MODEL, "auto", "fp32", 512)]
    assert (np.array(Image.open("depth_up.png"))[0, 4:8] == 0).all()
    code, out, err = run("upsample", "depth.png", "guide.jpg", "--config", "c.toml", "--skip-existing")
    assert code == 0 and json.loads(out)["status"] == "skipped" and err.startswith("skipped depth_up.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1", "'colour' must be an option"),
        ("[upsample]\nbuild = true", "'build' must be an option of upsample"),
        ("[other]\na = 1", "'other' must be an option"),
        ("depth = 'x'", "'depth' must be an option"),
        ("= 1", "must be a readable TOML file"),
        ('precision = "fp8"', "'fp8'"),
    ],
)
def test_bad_config(folder, fake, run, text, message):
    Path("c.toml").write_text(text)
    code, out, err = run("upsample", "depth.png", "guide.jpg", "--config", "c.toml")
    assert (code, out) == (2, "") and err.startswith("error: ") and message in err


# --- what it refuses ---


def save_rgb(name, size):
    Image.new("RGB", size).save(name)


BAD = {
    "missing depth": (["none.png", "guide.jpg"], 4, "none.png: must exist; there is no such file"),
    "missing guide": (["depth.png", "none.jpg"], 4, "none.jpg: must exist; there is no such file"),
    "swapped": (["guide.jpg", "depth.png"], 4, "guide.jpg: depth must be one of .png, .tif"),
    "colour depth": (["guide.png", "guide.jpg"], 4, "guide.png: depth must have one channel; got 3 channels"),
    "no pixel": (["zeros.npy", "guide.jpg"], 4, "zeros.npy: has no valid pixel"),
    "aspect": (["depth.png", "wide.png"], 4, "depth depth.png is 8x6, guide wide.png is 64x24, 100.0% off"),
    "larger": (["depth.png", "small.png"], 4, "depth depth.png is 8x6, guide small.png is 4x3"),
    "guide is text": (["depth.png", "text.jpg"], 4, "its content is none of them"),
    "too far": (["far.npy", "guide.jpg", "--format", "png"], 4, "at most 65.535 m; got 70 m"),
    "max pixels": (
        ["depth.png", "guide.jpg", "--max-pixels", "700"],
        4,
        "at most 700 pixels; got 32x24 = 768",
    ),
    "no folder": (["depth.png", "guide.jpg", "-o", "none/r.png"], 6, "its folder must exist; none does not"),
    "is a folder": (["depth.png", "guide.jpg", "-o", "."], 6, "an output must be a file; this is a folder"),
    "one name": (["depth.png", "guide.jpg", "-o", "r.png", "--preview", "r.png"], 6, "must be two files"),
    "suffix": (["depth.png", "guide.jpg", "-o", "r.exe"], 2, "-o must end in one of .png"),
    "format": (
        ["depth.png", "guide.jpg", "-o", "r.png", "--format", "npy"],
        2,
        "--format must agree with -o",
    ),
    "unit": (["depth.png", "guide.jpg", "--unit", "inch"], 2, "unit must be a name or a number"),
    "invalid": (["depth.png", "guide.jpg", "--invalid", "x"], 2, "invalid values must be numbers"),
    "tile": (
        ["depth.png", "guide.jpg", "--tile", "-4"],
        2,
        "--tile must be auto, none or a number of pixels",
    ),
    "device": (["depth.png", "guide.jpg", "--device", "tpu"], 2, "--device must be auto, cpu, cuda"),
    "precision": (["depth.png", "guide.jpg", "--precision", "int8"], 2, "'int8'"),
    "both": (["depth.png", "guide.jpg", "--overwrite", "--skip-existing"], 2, "must not be given together"),
    "json and stdout": (["depth.png", "guide.jpg", "--json", "-o", "-"], 2, "must not share stdout"),
    "no guide": (["depth.png"], 2, "Missing argument 'GUIDE'"),
    "unknown option": (["depth.png", "guide.jpg", "--colour"], 2, "No such option: --colour"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(folder, fake, run, case):
    save_rgb("guide.png", (32, 24))
    save_rgb("wide.png", (64, 24))
    save_rgb("small.png", (4, 3))
    Path("text.jpg").write_text("hello")
    np.save("zeros.npy", np.zeros((6, 8)))
    np.save("far.npy", np.full((6, 8), 70.0))
    before = tree(folder)
    arguments, expected, message = BAD[case]
    code, out, err = run("upsample", *arguments)
    assert code == expected, err
    assert err.startswith("error: ") and message in err.splitlines()[0]
    assert out == "" or case == "json and stdout"
    assert all(line.startswith(("error: ", "hint: ")) for line in err.splitlines())
    assert tree(folder) == before and fake.made == []


@pytest.mark.parametrize("case", ["missing guide", "no folder", "too far", "suffix"])
def test_json_under_failure(folder, fake, run, case):
    np.save("far.npy", np.full((6, 8), 70.0))
    arguments, expected, message = BAD[case]
    code, out, err = run("upsample", *arguments, "--json")
    assert code == expected
    record = json.loads(out)
    assert list(record) == KEYS
    assert record["status"] == "failed" and message in record["error"] and message in err


def test_unknown_model(folder, run):
    code, _, err = run("upsample", "depth.png", "guide.jpg", "--model", "nonsense")
    assert code == 7 and "no model named 'nonsense'" in err and "\nhint: known models: " in err


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\x08\0\0\0\0\0\0\0{}      ", None])
def test_unreadable_weights(folder, run, content):
    path = folder / "w.safetensors"
    if content is not None:
        path.write_bytes(content)
    code, out, err = run("upsample", "depth.png", "guide.jpg", "--model", path, "--json")
    assert code == 7 and err.startswith(f"error: {path}: ") and json.loads(out)["status"] == "failed"


def test_absent_gpu(folder, run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = run("upsample", "depth.png", "guide.jpg", "--device", "cuda:9")
    assert code == DeviceError.exit_code == 8 and "cuda:9" in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 8, "memory must hold the work; it ran out"),
        (DeviceError("cuda:0: out of memory", "--tile 512"), 8, "cuda:0: out of memory"),
        (ZeroDivisionError("division by zero"), 1, "internal error: ZeroDivisionError: division by zero"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_failures_inside(folder, fake, run, monkeypatch, error, code, message):
    def fail(self, depth, guide, *, valid, fill):
        raise error

    monkeypatch.setattr(fake, "__call__", fail)
    before = tree(folder)
    status, out, err = run("upsample", "depth.png", "guide.jpg", "--json")
    assert status == code and message in err and "Traceback" not in err
    assert json.loads(out)["status"] == "failed" and tree(folder) == before
    if code == 1:
        assert "Traceback" in run("upsample", "depth.png", "guide.jpg", "--debug")[2]


def test_full_disk_leaves_nothing(folder):
    code = f"""{DRIVER}
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
sys.exit(main())
"""
    before = tree(folder)
    done = shell(Path(__file__).parent, "upsample", "depth.png", "guide.jpg", code=code, cwd=folder)
    assert done.returncode == 6, done.stderr
    assert (
        done.stderr.startswith(b"error: depth_up.png: must be writable (") and b"hint: free some space" in done.stderr
    )
    assert tree(folder) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_stdout(folder, fake):
    code = DRIVER + "sys.exit(main())"
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                code,
                Path(__file__).parent,
                "upsample",
                "depth.png",
                "guide.jpg",
                "-o",
                "-",
            ],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            timeout=120,
        )
    assert done.returncode == 6 and b"error: stdout must take" in done.stderr


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_nothing(folder, number, expected):
    # The child stops in the middle of writing, when the temporary file is there.
    code = f"""{DRIVER}
import os, signal, time
# Background jobs are born deaf to ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
def wait(descriptor):
    print("writing", len([n for n in os.listdir() if n.endswith(".tmp")]), file=sys.stderr, flush=True)
    time.sleep(60)
os.fsync = wait
sys.exit(main())
"""
    before = tree(folder)
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parent), "upsample", "depth.png", "guide.jpg"],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        cwd=folder,
    )
    with child:
        assert child.stderr.readline() == b"writing 1\n"
        child.send_signal(number)
        rest = child.stderr.read()
        assert child.wait(timeout=60) == expected, rest
    assert b"Traceback" not in rest and tree(folder) == before


def test_library_warnings_become_notes(folder, fake, run, monkeypatch):
    def warn(self, depth, guide, *, valid, fill):
        logging.getLogger("ddfup").warning("no native kernels")
        return large(depth)

    monkeypatch.setattr(fake, "__call__", warn)
    _, out, err = run("upsample", "depth.png", "guide.jpg")
    assert out == "" and err.startswith("note: no native kernels\nwrote ")
    assert run("upsample", "depth.png", "guide.jpg", "--overwrite", "-q") == (0, "", "")
    _, _, err = run("upsample", "depth.png", "guide.jpg", "--overwrite", "-v")
    assert "read depth.png: uint16 in mm, 97.9% valid, 1 to 1.047 m\n" in err


# --- other commands ---


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A weights folder with one whole and one damaged file."""
    store = tmp_path / "weights"
    for name in ("good", "bad"):
        network = models.build("pyramid", {})
        models.save_weights(
            store / f"{name}.safetensors", network, architecture="pyramid", name=name, description="a test"
        )
    damaged = bytearray((store / "bad.safetensors").read_bytes())
    damaged[-1] ^= 1
    (store / "bad.safetensors").write_bytes(bytes(damaged))
    monkeypatch.setattr(models, "resource_dir", lambda name: store)
    return store


def test_models_lists_and_verifies(weights, run):
    code, out, err = run("models", "--json")
    records = {record["name"]: record for record in map(json.loads, out.splitlines())}
    assert code == 7 and "sha256" in err
    assert records["good"]["status"] == "ok" and records["bad"]["status"] == "failed"
    assert records["good"]["sha256"] == hashlib.sha256((weights / "good.safetensors").read_bytes()).hexdigest()
    (weights / "bad.safetensors").unlink()
    code, out, err = run("models")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split()[0] == "model" and out.splitlines()[1].split()[:2] == [
        "good",
        "pyramid",
    ]


def test_damaged_weights_are_refused(folder, weights, run):
    code, _, err = run("upsample", "depth.png", "guide.jpg", "--model", "bad")
    assert code == 7 and "do not match their sha256" in err


def test_a_real_network_from_end_to_end(folder, weights, run):
    code, out, err = run("upsample", "depth.png", "guide.jpg", "--model", "good", "--device", "cpu", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["model"] == "good" and record["device"] == "cpu" and record["kernels"] in ("native", "torch")
    values = np.array(Image.open("depth_up.png"))
    assert values.dtype == np.uint16 and values.shape == (24, 32)
    # An untrained network starts from interpolation: nothing can leave the input's range by far.
    assert values[values > 0].min() > 900 and values.max() < 1150
    assert (values[9:11, 13:15] == 0).all(), "the hole stays a hole"


def test_doctor(run, weights):
    (weights / "bad.safetensors").unlink()
    code, out, err = run("doctor", "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["ddfup"] == ddfup.__version__ and facts["models"] == ["good"]
    assert {"png", "tiff", "npy"} <= set(facts["formats"]) and {"cpu", "cuda"} <= set(facts["kernels"])
    code, out, _ = run("doctor")
    assert code == 0 and facts["kernels"]["cpu"]["reason"] in out
    (weights / "good.safetensors").write_bytes(b"")
    code, out, err = run("doctor", "-v")
    assert code == 7 and "error: " in err and f"\ntorch      {torch.__version__}\n" in out


def test_doctor_says_when_a_build_fails(run, weights, monkeypatch, tmp_path):
    (weights / "bad.safetensors").unlink()
    monkeypatch.delenv("DDFUP_KERNELS", raising=False)
    environment = {"CXX": "/bin/false", "DDFUP_CACHE_DIR": str(tmp_path / "cache")}
    done = shell("doctor", "--build", env=environment)
    assert done.returncode == 1 and done.stderr.startswith(b"error: "), done.stderr
    assert b"PyTorch: " in done.stdout


def test_doctor_says_when_the_build_for_other_gpus_fails(run, weights, monkeypatch):
    (weights / "bad.safetensors").unlink()
    monkeypatch.delenv("DDFUP_KERNELS", raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")

    def refuse(target):
        raise compilers.BuildFailure("nvcc refuses", "ask it why")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "_failed", {})
    monkeypatch.setattr(native, "_load_library", lambda device, rebuild: None)
    monkeypatch.setattr(native, "_provide_library", lambda device, rebuild: refuse(device))
    code, out, err = run("doctor", "--build")
    assert (code, err) == (1, "error: cuda: nvcc refuses\nhint: ask it why\n")
    assert "PyTorch: nvcc refuses" in out
    code, out, _ = run("doctor", "--json")
    assert code == 0 and json.loads(out)["kernels"]["cuda"]["failed"] is True


def test_demo(tmp_path, fake, run, monkeypatch):
    monkeypatch.setattr(fake, "__call__", lambda self, depth, guide: np.repeat(np.repeat(depth, 8, 0), 8, 1))
    folder = tmp_path / "out"
    for _ in range(2):
        code, out, _ = run("demo", "-o", folder, "--json")
        assert code == 0
        record = json.loads(out)
        assert {Path(path).name for path in record["files"]} == {path.name for path in folder.iterdir()}
    assert {"depth.png", "depth_up.png", "preview.png", "errors.png"} < {path.name for path in folder.iterdir()}
    with Image.open(folder / "depth.png") as low, Image.open(folder / "depth_up.png") as high:
        assert high.size == (8 * low.width, 8 * low.height) == (record["width"], record["height"])
    assert record["rmse_mm"]["ddfup"] > record["rmse_mm"]["bicubic"] > 0
    code, out, err = run("demo", "-o", folder)
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == [
        "method",
        "ddfup",
        "bicubic",
        "bilinear",
    ]
    assert "wrote " in err
    (tmp_path / "file").write_text("")
    code, _, err = run("demo", "-o", tmp_path / "file")
    assert code == 6 and "must be a folder or become one" in err


@pytest.mark.parametrize("name", ["depth.png", "guide.jpg", "preview.png", "errors.png", "depth_up.png"])
def test_demo_keeps_files_that_are_not_its_own(tmp_path, fake, run, monkeypatch, name):
    monkeypatch.setattr(fake, "__call__", lambda self, depth, guide: np.repeat(np.repeat(depth, 8, 0), 8, 1))
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / name).write_bytes(b"precious")
    code, _, err = run("demo", "-o", folder)
    assert code == 6 and f"{name}: must not exist yet; it does\nhint: --overwrite" in err
    assert tree(tmp_path) == {f"photos/{name}": hashlib.sha256(b"precious").hexdigest()} and fake.made == []
    assert run("demo", "-o", folder, "--overwrite", "-q")[0] == 0
    # Now it is a demo's folder, as long as what the demo begins with is there.
    assert run("demo", "-o", folder, "-q")[0] == 0
    if name in ("depth.png", "guide.jpg"):
        (folder / name).write_bytes(b"precious")
        assert run("demo", "-o", folder)[0] == 6 and (folder / name).read_bytes() == b"precious"


def test_a_demo_that_fails_takes_its_folders_along(tmp_path, fake, run, monkeypatch):
    def fail(self, depth, guide):
        raise DeviceError("out of memory")

    monkeypatch.setattr(fake, "__call__", fail)
    assert run("demo", "-o", tmp_path / "new" / "demo")[0] == 8
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    assert run("demo", "-o", tmp_path / "old")[0] == 8
    assert (tmp_path / "old").is_dir()


def test_a_benchmark_that_fails_takes_its_folders_along(folder, run, monkeypatch):
    for place, name in (("depth", "depth.png"), ("rgb", "guide.jpg")):
        (folder / "set" / place).mkdir(parents=True)
        Image.open(name).resize((64, 48), Image.Resampling.NEAREST).save(folder / "set" / place / f"a{name[-4:]}")

    def fail(files):
        raise OutputError("means.csv: must be writable; got No space left on device")

    monkeypatch.setattr("ddfup.writing.write_files", fail)
    arguments = ("benchmark", "set", "-o", "new/table", "--method", "bicubic", "--factor", "2", "--crop-border", "0")
    code, _, err = run(*arguments)
    assert code == 6 and "No space left" in err and not Path("new").exists()
    Path("new").mkdir()
    assert run(*arguments)[0] == 6 and list(Path("new").iterdir()) == []


def test_a_network_is_not_replaced_by_what_is_made_of_it(weights, run):
    file = weights / "good.safetensors"
    before = tree(weights)
    for arguments in (("export", "pt2"), ("bench",)):
        code, _, err = run(*arguments, "--model", file, "-o", file, "--overwrite")
        assert code == 6 and "an output must not replace an input" in err
    assert tree(weights) == before


# --- help ---

HELP = {name: [name, "--help"] for name in ("upsample", "demo", "models", "doctor")} | {"": ["--help"]}


@pytest.mark.parametrize("command", HELP)
def test_help_is_there_and_loads_no_torch(command):
    code = (
        "import sys; from ddfup.cli import main; code = main();"
        "heavy = {'torch', 'numpy', 'cv2', 'PIL', 'rich'} & set(sys.modules);"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = shell(*HELP[command], code=code)
    assert done.returncode == 0, done.stderr
    assert b"Usage: ddfup" in done.stdout and done.stderr == b""


def commands():
    names = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
    return [name.replace("_", "-") for name in names]


def test_every_command_has_help_and_is_in_the_readme(run):
    readme = (CHECKOUT / "README.md").read_text("utf-8")
    for name in commands():
        code, out, _ = run(name, "--help")
        assert code == 0 and f"Usage: ddfup {name}" in out
        assert len(out.split("\n\n")[1].strip()) > 20, f"{name} has no description"
        for line in re.findall(r"^  (?:-\w, )?--[\w-]+.*(?:\n {10,}.*)*", out, re.MULTILINE):
            assert re.search(r"\S(?:  +|\n +)[A-Z]", line), f"{name}: {line} has no help"
        assert f"ddfup {name}" in readme, f"README.md does not show ddfup {name}"


def test_version_and_no_arguments(run):
    assert run("--version") == (0, f"ddfup {ddfup.__version__}\n", "")
    code, out, err = run()
    assert (code, err) == (0, "") and "Commands:" in out
    code, out, err = run("upsmaple")
    assert (code, out) == (2, "") and err.startswith("error: No such command 'upsmaple'")


def test_the_checkout_runner():
    done = subprocess.run([sys.executable, CHECKOUT / "cli.py", "--version"], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"ddfup {ddfup.__version__}\n".encode())


def test_defaults_are_those_of_the_library():
    from ddfup import io

    assert options.DepthFormat.__args__ == tuple(io.FORMATS)
    assert pair.Options().max_pixels == io.DEFAULT_MAX_PIXELS == 200_000_000
    assert str(io.parse_invalid("0,nan,inf")) == str(io.DEFAULT_INVALID)
