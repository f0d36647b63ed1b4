"""`ddfup info`: figures against plain numpy, guesses, text and JSON."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from depth_files import RAMP, exr, npy, npz, pfm, save
from PIL import Image

import ddfup
from ddfup import cli, info, io
from ddfup.errors import InputError


@pytest.fixture
def run(capfd):
    def call(*arguments):
        code = cli.main(["info", *map(str, arguments)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def depth_map() -> np.ndarray:
    values = np.random.default_rng(0).integers(600, 4000, (30, 40)).astype(np.uint16)
    values[:3] = 0
    return values


def test_figures(tmp_path):
    values = depth_map()
    Image.fromarray(values).save(tmp_path / "d.png")
    facts = info.describe(tmp_path / "d.png")
    metres = values[values > 0] / 1000
    assert {key: facts[key] for key in ("kind", "format", "width", "height", "dtype", "unit")} == {
        "kind": "depth",
        "format": "png",
        "width": 40,
        "height": 30,
        "dtype": "uint16",
        "unit": "mm",
    }
    assert facts["bytes"] == (tmp_path / "d.png").stat().st_size
    assert facts["holes_fraction"] == pytest.approx(0.1) and facts["valid_fraction"] == pytest.approx(0.9)
    assert (facts["minimum"], facts["maximum"]) == pytest.approx((metres.min(), metres.max()))
    assert (facts["stored_minimum"], facts["stored_maximum"]) == (values[values > 0].min(), values.max())
    for share, mark in facts["percentiles"].items():
        assert (metres <= mark + 1e-9).mean() * 100 == pytest.approx(float(share), abs=0.2)
    edges, counts = facts["histogram"]["edges"], facts["histogram"]["counts"]
    assert sum(counts) == metres.size and len(edges) == len(counts) + 1 == 17
    for low, high, count in list(zip(edges, edges[1:], counts, strict=False))[1:-1]:
        assert count == ((metres >= low) & (metres < high)).sum()
    assert counts[0] == (metres < edges[1]).sum()


def test_lines_fit_a_terminal(tmp_path):
    path = save(tmp_path / "d.exr", exr({"Z": np.linspace(1e-3, 123456, 600, dtype=np.float32).reshape(20, 30)}))
    facts = info.describe(path)
    lines = list(info.lines(facts))
    assert max(map(len, lines)) <= 80 and sum("█" in line for line in lines) == 16
    assert any(line.startswith("holes        0.0% (0 pixels)") for line in lines)
    plain = list(info.lines(facts, blocks=" #"))
    assert "".join(plain).isascii() and sum("#" in line for line in plain) == 16


def test_bars_are_as_long_as_their_counts():
    facts = info.describe(Path(ddfup.__file__).parent / "demo" / "depth.png")
    bars = [line for line in info.lines(facts) if "█" in line or line.endswith("%")]
    longest = max(line.count("█") for line in bars)
    counts = facts["histogram"]["counts"]
    for line, count in zip(bars[-16:], counts, strict=True):
        assert abs(line.count("█") - count / max(counts) * longest) <= 1


GUESSES = [
    (np.full((2, 2), 1500, np.uint16), "d", "mm"),
    (np.full((2, 2), 1.5, np.float32), "d", "m"),
    (np.full((2, 2), 1500.5, np.float32), "d", "mm"),
    (np.full((2, 2), 25000, np.uint16) + np.arange(2, dtype=np.uint16), "d", "tum"),
    (np.array([[2400, 5000]], np.uint16) << 3, "d", "sunrgbd"),
    (np.array([[600, 700, 2047]], ">u2").view("<u2"), "d", "nyu-raw"),
    (np.full((2, 2), 30.5, np.float32), "left_disp", "disparity"),
    (np.full((2, 2), 200, np.uint8), "d", None),
]


@pytest.mark.parametrize(("array", "name", "unit"), GUESSES)
def test_guesses(tmp_path, array, name, unit):
    facts = info.describe(save(tmp_path / f"{name}.npy", npy(array)))
    assert facts["unit"] == unit and facts["unit_reason"]


def test_what_ddfup_wrote_is_known(tmp_path):
    for text in ("kitti", "4000"):
        unit = io.parse_unit(text)
        data = io.encode_depth(RAMP, dtype=np.dtype(np.uint16), unit=unit, target=io.FORMATS["png"])
        facts = info.describe(save(tmp_path / "d.png", data))
        assert facts["unit"] == unit.name and facts["unit_reason"] == "ddfup wrote it into the file"
        assert facts["maximum"] == pytest.approx(5.0, abs=0.01) and facts["metadata"]["ddfup:unit"] == unit.name


def test_a_given_unit_wins(tmp_path):
    path = save(tmp_path / "d.npz", npz(depth=np.full((2, 2), 5000, np.uint16)))
    facts = info.describe(path, unit=io.UNITS["tum"])
    assert (facts["unit"], facts["unit_reason"], facts["maximum"]) == ("tum", "as given", 1.0)


def test_integers_show_what_else_they_may_mean(tmp_path):
    values = np.array([[0, 5105, 12805]], np.uint16)
    facts = info.describe(save(tmp_path / "d.npy", npy(values)))
    assert facts["unit"] == "mm"
    steps = {"tum": 5000, "kitti": 256, "vkitti": 100}
    assert facts["otherwise"] == {name: [5105 / step, 12805 / step] for name, step in steps.items()}
    (line,) = (line for line in info.lines(facts) if line.startswith("otherwise"))
    assert line.split(maxsplit=1)[1] == "tum 1.02 to 2.56 m, kitti 19.9 to 50 m, vkitti 51 to 128 m"
    far = info.describe(save(tmp_path / "d.npy", npy(values + 20000)))
    assert far["unit"] == "tum" and list(far["otherwise"]) == ["mm", "kitti", "vkitti"]
    # Where it is known, nothing else is offered.
    assert info.describe(tmp_path / "d.npy", unit=io.UNITS["kitti"])["otherwise"] == {}
    data = io.encode_depth(RAMP, dtype=np.dtype(np.uint16), unit=io.UNITS["mm"], target=io.FORMATS["png"])
    assert info.describe(save(tmp_path / "d.png", data))["otherwise"] == {}
    assert info.describe(save(tmp_path / "d.npy", npy(values / np.float32(1000))))["otherwise"] == {}


def test_files_without_a_header(tmp_path, run):
    values = np.linspace(1, 3, 12, dtype=np.float32).reshape(3, 4)
    path = save(tmp_path / "0.depth", values.tobytes())
    code, _, err = run(path)
    assert code == 4 and "its name and content are neither" in err and "--raw 256x192" in err
    facts = info.describe(path, raw=(4, 3))
    assert (facts["format"], facts["dtype"], facts["unit"]) == ("raw", "float32", "m")
    assert (facts["minimum"], facts["maximum"]) == pytest.approx((1, 3))
    code, out, _ = run(save(tmp_path / "0.conf", bytes([0, 1, 2, 2] * 3)), "--raw", "4x3")
    assert code == 0 and "0 (low) 25.0%, 1 (medium) 25.0%, 2 (high) 50.0%" in out


@pytest.mark.parametrize(("unit", "label"), [(None, "m"), ("disparity", "disparity")])
def test_previews(tmp_path, run, unit, label):
    values = np.repeat([[0, 1000, 3000, 2000]], 3, axis=0).astype(np.uint16)
    path, look = save(tmp_path / "d.npz", npz(depth=values)), tmp_path / "look.png"
    options = ["--unit", unit] if unit else []
    code, out, err = run(path, "--preview", look, *options)
    assert code == 0 and "look.png" not in out and err == f"wrote {look}\n"
    with Image.open(look) as picture:
        pixels = np.array(picture.convert("RGB")).astype(int)
    # Four columns of one colour each, the first grey: no measurement.
    row = pixels[pixels.shape[0] // 3, : int(0.95 * pixels.shape[1])]
    runs = [row[0], *(after for before, after in itertools.pairwise(row) if (before != after).any())]
    hole, *colours = runs[1:5]
    assert max(hole) - min(hole) < 10
    near, far, middle = (sum(colour) for colour in colours)
    # In metres the near is bright, in disparity the large.
    assert (near > middle > far) if label == "m" else (near < middle < far)
    code, _, err = run(path, "--preview", look, *options)
    assert code == 6 and "must not exist yet" in err
    assert run(path, "--preview", look, "--overwrite", *options)[0] == 0


def test_previews_that_cannot_be(tmp_path, run):
    Image.new("RGB", (4, 4)).save(tmp_path / "g.jpg")
    code, _, err = run(tmp_path / "g.jpg", "--preview", tmp_path / "x.png")
    assert code == 4 and "this is a picture already" in err
    code, _, err = run(save(tmp_path / "d.npy", npy(np.zeros((3, 4)))), "--preview", tmp_path / "x.png")
    assert code == 4 and "has no valid pixel" in err
    assert run(tmp_path / "d.npy", "--preview", tmp_path / "x.tif")[0] == 2
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize("kind", ["name", "hard link", "symbolic link"])
def test_a_preview_never_replaces_its_file(tmp_path, run, kind):
    path, look = tmp_path / "d.png", tmp_path / ("d.png" if kind == "name" else "look.png")
    Image.fromarray(depth_map()).save(path)
    if kind == "hard link":
        os.link(path, look)
    elif kind == "symbolic link":
        look.symlink_to(path)
    before = path.read_bytes()
    code, _, err = run(path, "--preview", look, "--overwrite")
    assert code == 6 and "an output must not replace an input" in err and path.read_bytes() == before


def test_layout_tags_of_tiff_are_not_repeated(tmp_path):
    tifffile.imwrite(tmp_path / "d.tif", RAMP, compression="lzw", extratags=[(42113, "s", 0, "-9999", True)])
    notes = info.describe(tmp_path / "d.tif")["metadata"]
    assert notes["GDAL_NODATA"] == "-9999" and notes["Compression"] == "LZW"
    assert not {"ImageWidth", "BitsPerSample", "StripOffsets", "SampleFormat"} & notes.keys()


def test_confidence_and_emptiness_are_said(tmp_path):
    facts = info.describe(save(tmp_path / "c.npy", npy(np.array([[0, 1, 2, 2]], np.uint8))))
    assert facts["unit"] is None and "confidence" in facts["unit_reason"]
    assert facts["levels"] == {"0": 1, "1": 1, "2": 2}
    facts = info.describe(save(tmp_path / "e.pfm", pfm(np.full((3, 4), np.nan))))
    assert facts["holes_fraction"] == 1 and facts["minimum"] is None and facts["histogram"]["counts"] == []
    assert any("100.0% (12 pixels)" in line for line in info.lines(facts))
    json.loads(json.dumps(facts, allow_nan=False))


def test_constant_depth_has_a_histogram(tmp_path):
    facts = info.describe(save(tmp_path / "d.npy", npy(np.full((4, 5), 2.0))))
    assert sum(facts["histogram"]["counts"]) == 20


def test_pictures(tmp_path, run):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (30, 40)).save(tmp_path / "g.jpg", exif=exif)
    facts = info.describe(tmp_path / "g.jpg")
    assert {key: facts[key] for key in ("kind", "format", "width", "height", "orientation")} == {
        "kind": "picture",
        "format": "jpeg",
        "width": 40,
        "height": 30,
        "orientation": 6,
    }
    Image.new("RGB", (30, 40)).save(tmp_path / "g.png")
    assert info.describe(tmp_path / "g.png")["kind"] == "picture"
    code, out, err = run(tmp_path / "g.jpg")
    assert (code, err) == (0, "") and "40x30" in out and "EXIF 6" in out


def test_text_and_json(tmp_path, run):
    Image.fromarray(depth_map()).save(tmp_path / "d.png")
    code, out, err = run(tmp_path / "d.png")
    assert (code, err) == (0, "") and out.startswith("depth        PNG, 40x30, uint16, ")
    code, out, err = run(tmp_path / "d.png", "--json")
    record = json.loads(out)
    assert (code, err) == (0, "") and record["status"] == "ok" and record["unit"] == "mm"
    code, out, _ = run(tmp_path / "d.png", "--json", "--unit", "tum", "--invalid", "0,600")
    assert json.loads(out)["maximum"] == pytest.approx(record["stored_maximum"] / 5000)


@pytest.mark.parametrize(
    ("name", "data", "expected", "message"),
    [
        ("d.npz", b"PK\3\4", 4, "must be a whole NPZ file"),
        ("d.txt", b"hello", 4, "d.txt: must be a depth file or a picture; its name and content are neither"),
        ("none.png", None, 4, "must exist; there is no such file"),
        ("d.npz", npz(a=RAMP, b=RAMP), 4, "got 'a', 'b'"),
    ],
)
def test_refusals(tmp_path, run, name, data, expected, message):
    if data is not None:
        save(tmp_path / name, data)
    code, out, err = run(tmp_path / name, "--json")
    record = json.loads(out)
    assert code == expected and record["status"] == "failed" and message in record["error"] and message in err
    with pytest.raises(InputError):
        info.describe(tmp_path / name)


def test_a_unit_of_bits_needs_16_bits(tmp_path, run):
    code, _, err = run(save(tmp_path / "d.npz", npz(depth=RAMP)), "--unit", "sunrgbd")
    assert code == 2 and "unit sunrgbd is for unsigned 16-bit values; got float32" in err


@pytest.mark.parametrize(
    ("dtype", "mark"),
    [(np.float16, "1e10"), (np.float32, "1e300"), (np.uint16, "1e10"), (np.uint16, "-1"), (np.int16, "70000.5")],
)
def test_marks_beyond_the_type_are_no_matter(tmp_path, run, dtype, mark):
    values = np.array([[0, 1, 2, 3]], dtype)
    tifffile.imwrite(tmp_path / "tag.tif", values, extratags=[(42113, "s", 0, mark, True)])
    for file, options in (("tag.tif", []), ("d.npy", ["--invalid", f"0,{mark}"])):
        np.save(tmp_path / "d.npy", values)
        code, out, err = run(tmp_path / file, "--json", *options)
        assert (code, err) == (0, "") and json.loads(out)["valid_fraction"] == 0.75
        assert run(tmp_path / file, "--preview", tmp_path / "look.png", "--overwrite", *options)[0] == 0


def test_the_background_of_a_half_exr_is_no_matter(tmp_path, run):
    values = np.array([[1, 2, 3, np.inf]], np.float16)
    code, out, err = run(save(tmp_path / "d.exr", exr({"Z": values})), "--json")
    assert (code, err) == (0, "") and json.loads(out)["valid_fraction"] == 0.75


@pytest.mark.parametrize(
    "ends",
    [(1, 9), (1e3, 12345.6), (99999, 1e6), (1.5e7, 9.9e7), (1.25e8, 3e38), (1e-5, 1e-3), (0.00012345, 0.5)],
    ids=str,
)
@pytest.mark.parametrize("sign", [1, -1])
def test_percentiles_stand_apart(tmp_path, ends, sign):
    values = (sign * np.linspace(*ends, 300)).astype(np.float32).reshape(15, 20)
    facts = info.describe(save(tmp_path / "disparity.npy", npy(values)))
    lines = list(info.lines(facts))
    head = next(number for number, line in enumerate(lines) if line.startswith("percentiles"))
    shown = lines[head + 1].split()
    assert len(shown) == len(info.PERCENTILES) and max(map(len, lines)) <= 80
    for text, mark in zip(shown, facts["percentiles"].values(), strict=True):
        large = abs(mark) >= (1e8 if sign > 0 else 1e7)
        assert ("e" in text) == (large or abs(mark) < 1e-4)
        # Beside a sign and an exponent, or many zeros, is room for fewer digits.
        assert float(text) == pytest.approx(mark, rel=0.06 if large or abs(mark) < 1e-3 else 6e-4)


def test_figures_of_holes_below_zero_are_not_counted(tmp_path):
    values = np.array([[-32768, -5, 0, 1000, 2000, 3000]], np.int16)
    facts = info.describe(save(tmp_path / "d.npy", npy(values)))
    assert (facts["stored_minimum"], facts["stored_maximum"]) == (1000, 3000)
    assert facts["unit"] == "mm" and facts["holes_fraction"] == 0.5
    assert facts["otherwise"]["kitti"] == [1000 / 256, 3000 / 256]
    assert any("1 to 3 m (stored 1000 to 3000)" in line for line in info.lines(facts))
    # A disparity may be negative.
    facts = info.describe(tmp_path / "d.npy", unit=io.UNITS["disparity"])
    assert (facts["stored_minimum"], facts["stored_maximum"]) == (-32768, 3000)


def test_the_guess_is_about_what_is_measured(tmp_path):
    values = np.array([[-1] * 9 + [31000]], np.int32)
    facts = info.describe(save(tmp_path / "d.npy", npy(values)))
    assert (facts["unit"], facts["unit_reason"]) == ("tum", "integers around 31000: far for mm, likely 5000 per metre")


def test_only_holes_below_zero(tmp_path, run):
    code, out, err = run(save(tmp_path / "d.npy", npy(np.full((3, 4), -7, np.int16))), "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "") and facts["holes_fraction"] == 1
    assert facts["stored_minimum"] is facts["stored_maximum"] is facts["minimum"] is None


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_a_turned_depth_map_is_said_to_be_one(tmp_path, suffix):
    values = depth_map()
    if suffix == ".tif":
        tifffile.imwrite(tmp_path / "d.tif", values, extratags=[(274, "H", 1, 6, True)])
    else:
        exif = Image.Exif()
        exif[274] = 6
        Image.fromarray(values).save(tmp_path / "d.png", exif=exif)
    facts = info.describe(tmp_path / f"d{suffix}")
    assert (facts["width"], facts["height"], facts["orientation"]) == (30, 40, 6)
    assert any(line.startswith("orientation  EXIF 6: stored on its left side") for line in info.lines(facts))
    tifffile.imwrite(tmp_path / "upright.tif", values)
    facts = info.describe(tmp_path / "upright.tif")
    assert facts["orientation"] == 1 and not any(line.startswith("orientation") for line in info.lines(facts))


def test_a_terminal_without_unicode(tmp_path):
    path = save(tmp_path / "d.npy", npy(np.linspace(1, 2, 50).reshape(5, 10)))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(ddfup.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "ddfup", "info", path], capture_output=True, env=environment, timeout=60
    )
    assert done.returncode == 0 and b"####" in done.stdout and done.stdout.isascii(), done.stderr
