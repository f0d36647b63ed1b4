"""`ddfup report`: figures, files, exit codes, what is never left behind."""

import csv
import html
import html.parser
import json
import math
import re

import numpy as np
import pytest
from depth_folders import prediction, truth, write_folders, write_png
from PIL import Image

from ddfup import cli
from ddfup.metrics import METRICS, evaluate
from ddfup.report import read_report
from ddfup.report.run import PICTURES

NAMES = ("room/a", "room/b", "hall")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_folders(tmp_path, NAMES)


def report(*arguments):
    return cli.main(["report", *map(str, arguments)])


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def stored(path):
    with Image.open(path) as image:
        depth = np.array(image).astype(np.float32) / 1000
    return np.where(depth > 0, depth, np.nan)


def test_figures_in_json_and_csv_are_those_of_evaluate(folders, capsys):
    assert report("pred", "gt", "--max-depth", 2.6, "--crop-border", 2) == 0
    content = json.loads((folders / "pred_report" / "metrics.json").read_text())
    assert (content["prediction"], content["truth"], content["unit"]) == ("pred", "gt", "m")
    assert (content["settings"]["crop_border"], content["settings"]["max_depth"]) == (2, 2.6)
    assert list(content["metrics"]) == list(METRICS)
    assert [image["name"] for image in content["images"]] == sorted(NAMES)
    inner = np.s_[2:-2, 2:-2]
    expected = {
        name: evaluate(stored(f"pred/{name}.png")[inner], stored(f"gt/{name}.png")[inner], max_depth=2.6)
        for name in NAMES
    }
    for image in content["images"]:
        assert image["metrics"] == pytest.approx(expected[image["name"]], rel=1e-6)
        assert (image["status"], image["width"], image["height"]) == ("ok", 80, 60)
    values = [expected[name]["rmse"] for name in NAMES]
    rmse = content["summary"]["rmse"]
    assert rmse["mean"] == pytest.approx(sum(values) / 3, rel=1e-6)
    assert rmse["median"] == pytest.approx(sorted(values)[1], rel=1e-6)
    assert (rmse["worst_image"], rmse["images"]) == ("hall", 3)
    assert content["summary"]["delta1"]["worst"] <= content["summary"]["delta1"]["best"]
    with (folders / "pred_report" / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == sorted(NAMES)
    assert float(rows[0]["ssim"]) == pytest.approx(expected["hall"]["ssim"], rel=1e-6)
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("rmse"))
    assert f"{1000 * rmse['mean']:.1f}" in line and " mm " in line and line.endswith("hall")


def test_read_report_reads_what_was_written(folders, capsys):
    assert report("pred", "gt", "-q") == 0
    again = read_report(folders / "pred_report")
    assert again == read_report(folders / "pred_report" / "metrics.json")
    assert {row.name for row in again.good} == set(NAMES)
    assert again.metrics == METRICS


def test_every_picture_is_there_and_nothing_else(folders, capsys):
    assert report("pred", "gt", "--guides", "guides", "--inputs", "low", "-o", "out/deep") == 0
    out = folders / "out" / "deep"
    kinds = {"guide": ".jpg", "input": ".png", "result": ".jpg", "truth": ".jpg", "error": ".jpg"}
    pictures = {f"{PICTURES}/{n:05d}-{kind}{suffix}" for n in (1, 2, 3) for kind, suffix in kinds.items()}
    assert set(tree(out)) == pictures | {"report.html", "metrics.json", "metrics.csv", PICTURES}
    for kind, size in (("input.png", (10, 8)), ("result.jpg", (80, 60))):
        with Image.open(out / PICTURES / f"00001-{kind}") as picture:
            assert picture.size == size
    page = (out / "report.html").read_text()
    assert set(re.findall(rf'(?:data-full|href)="({PICTURES}/[^"]+)"', page)) == pictures
    assert page.count("data:image/webp;base64,") == len(pictures)


def as_bits(mask):
    return Image.fromarray(mask).convert("1")


def as_colours(mask):
    return Image.fromarray(np.stack([0 * mask, mask, 0 * mask], axis=-1))


def as_palette(mask):
    picture = Image.fromarray((mask > 0).astype(np.uint8), "P")
    picture.putpalette([0, 0, 0, 200, 30, 30])
    return picture


@pytest.mark.parametrize("kind", [as_bits, as_colours, as_palette, "npy", "tif"])
def test_masks_are_what_people_have(folders, kind):
    mask = np.zeros((60, 80), np.uint8)
    mask[10:30, 10:70] = 255
    path = folders / f"mask.{kind if isinstance(kind, str) else 'png'}"
    if kind == "npy":
        np.save(path, mask > 0)
    elif kind == "tif":
        Image.fromarray(mask).save(path)
    else:
        kind(mask).save(path)
    assert report("pred/hall.png", "gt/hall.png", "--mask", path, "-o", "out") == 0
    expected = evaluate(stored("pred/hall.png"), stored("gt/hall.png"), valid=mask > 0)
    assert read_report(folders / "out").rows[0].figures["rmse"] == pytest.approx(expected["rmse"])


def test_what_is_no_mask_is_told_as_one(folders, capsys):
    np.save(folders / "mask.npy", np.zeros((60, 80, 3), bool))
    assert report("pred/hall.png", "gt/hall.png", "--mask", "mask.npy", "-o", "out") == 4
    error = capsys.readouterr().err
    assert "mask.npy: " in error and "(as a mask)" in error


def test_a_mask_leaves_out_what_is_0_in_it(folders, capsys):
    mask = np.zeros((60, 80), np.uint8)
    mask[10:30, 10:70] = 255
    for name in NAMES:
        (folders / "mask" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(folders / "mask" / f"{name}.png")
    assert report("pred", "gt", "--mask", "mask") == 0
    result = read_report(folders / "pred_report")
    image = result.rows[0]
    assert result.settings["masks"]
    assert "inside the mask" in (folders / "pred_report" / "report.html").read_text()
    expected = evaluate(stored("pred/hall.png"), stored("gt/hall.png"), valid=mask > 0)
    assert image.figures == pytest.approx(expected, rel=1e-6)
    Image.fromarray(mask[1:]).save(folders / "mask" / "hall.png")
    assert report("pred", "gt", "--mask", "mask", "--overwrite") == 3
    assert "hall.png: must have the size of" in capsys.readouterr().err


def test_units_of_both_sides(folders, capsys):
    depth = truth(0)
    np.save(folders / "t.npy", depth)
    Image.fromarray((depth * 256).round().astype(np.uint16)).save(folders / "p.png")
    assert report("p.png", "t.npy", "--unit", "kitti", "--gt-unit", "m") == 0
    assert read_report(folders / "p_report").rows[0].figures["rmse"] == pytest.approx(1 / 256 / 12**0.5, rel=0.2)
    np.save(folders / "d.npy", 30 / depth)
    np.save(folders / "e.npy", 30 / depth + 2)
    assert report("e.npy", "d.npy", "--unit", "disparity") == 0
    again = read_report(folders / "e_report")
    assert (again.unit, again.rows[0].figures["bad_1"], again.rows[0].figures["bad_3"]) == ("", 1.0, 0.0)
    assert report("p.png", "t.npy", "--unit", "m", "--gt-unit", "disparity", "--overwrite") == 4
    assert "must both be depth or both disparity; got m and disparity" in capsys.readouterr().err


def test_thresholds_are_options(folders, capsys):
    options = ("--bad", "0.02", "--bad-relative", "0.01,0.2", "--edge-jump", "0.3")
    assert report("pred", "gt", *options) == 0
    figures = read_report(folders / "pred_report").rows[0].figures
    assert [name for name in figures if name.startswith("bad")] == ["bad_2cm", "bad_1pct", "bad_20pct"]
    assert report("pred", "gt", "--bad", "x", "--overwrite") == 2
    assert report("pred", "gt", "--max-depth", "0", "--overwrite") == 2


def test_a_bad_pair_does_not_stop_the_others(folders, capsys):
    write_png(folders / "pred" / "small.png", truth(9)[::2])
    write_png(folders / "gt" / "small.png", truth(9))
    (folders / "pred" / "cut.png").write_bytes((folders / "pred" / "hall.png").read_bytes()[:200])
    write_png(folders / "gt" / "cut.png", truth(9))
    assert report("pred", "gt") == 3
    result = read_report(folders / "pred_report")
    assert {row.name for row in result.bad} == {"small", "cut"}
    assert {row.name for row in result.good} == set(NAMES)
    small = next(row for row in result.bad if row.name == "small")
    assert "must have the size of gt/small.png, 80x60; got 80x30" in small.error
    page = (folders / "pred_report" / "report.html").read_text()
    assert "2 failed" in page and small.error in html.unescape(page)
    assert "failed: cut: " in capsys.readouterr().err


def test_exit_codes_and_nothing_left_over(folders, capsys):
    before = tree(folders)
    write_png(folders / "flat.png", truth(0)[:5])
    assert report("flat.png", "gt/hall.png") == 4
    assert report("flat.png", "flat.png", "--crop-border", "3", "-o", "new/folder") == 4
    assert "must be larger than a border of 3 px on each side; got 80x5" in capsys.readouterr().err
    assert report("pred", "guides") == 5
    assert report("pred", "missing") == 4
    assert report("pred", "gt", "-o", "flat.png") == 6
    assert report("pred", "gt", "surplus") == 2
    assert report("pred", "gt", "--dry-run") == 0
    assert tree(folders) == sorted([*before, "flat.png"])


def test_an_older_report_is_replaced_as_a_whole_or_not_at_all(folders, capsys, monkeypatch):
    assert report("pred", "gt", "--inputs", "low") == 0
    out = folders / "pred_report"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert report("pred", "gt") == 6
    assert "must not exist yet; it does" in capsys.readouterr().err

    def full(files):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ddfup.writing.write_files", full)
        assert report("pred", "gt", "--overwrite") == 6
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert report("pred", "gt", "--overwrite") == 0
    assert not list((out / PICTURES).glob("*-input.png"))
    assert not [path for path in tree(out) if ".tmp" in path]


def test_a_picture_folder_with_other_files_is_not_touched(folders, capsys):
    assert report("pred", "gt") == 0
    (folders / "pred_report" / PICTURES / "mine.txt").write_text("keep")
    assert report("pred", "gt", "--overwrite") == 6
    assert (folders / "pred_report" / PICTURES / "mine.txt").read_text() == "keep"


def test_json_is_one_object_per_pair_on_stdout(folders, capsys):
    write_png(folders / "pred" / "small.png", truth(9)[::2])
    write_png(folders / "gt" / "small.png", truth(9))
    assert report("pred", "gt", "--json") == 3
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(record["name"], record["status"]) for record in records] == [
        ("hall", "ok"),
        ("room/a", "ok"),
        ("room/b", "ok"),
        ("small", "failed"),
    ]
    assert set(records[0]["metrics"]) == set(METRICS) and records[3]["metrics"] == {}


def test_what_is_not_defined_is_null_and_an_empty_cell(folders, capsys):
    np.save(folders / "same.npy", truth(0))
    assert report("same.npy", "same.npy", "--edge-jump", "9") == 0
    content = json.loads((folders / "same_report" / "metrics.json").read_text())
    figures = content["images"][0]["metrics"]
    assert (figures["psnr"], figures["edge_rmse"], figures["rmse"]) == (None, None, 0)
    with (folders / "same_report" / "metrics.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert (row["psnr"], row["edge_rmse"], row["rmse"]) == ("", "", "0.0")
    assert math.isnan(read_report(folders / "same_report").rows[0].figures["psnr"])


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "@SUM(1)", "+1", "-1", " =1"])
def test_no_cell_is_a_formula(folders, capsys, name):
    depth = truth(0)
    for side in ("p", "t"):
        write_png(folders / side / f"x{name.replace('/', '')}.png", depth)
        write_png(folders / side / f"{name.replace('/', '')}.png", prediction(depth, 0, 0.01))
    assert report("p", "t") == 0
    with (folders / "p_report" / "metrics.csv").open() as stream:
        cells = [row["name"] for row in csv.DictReader(stream)]
    assert len(cells) == 2
    for cell in cells:
        assert cell.strip()[0] not in "=+-@|%"


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} has {name}"
            if name in ("src", "href", "data-full", "srcset", "action", "poster"):
                self.links.append(value)


def test_hostile_names_stay_text(folders, capsys):
    names = [
        '"><script>alert(1)<',
        "'onmouseover='x",
        "{{ 7*7 }}",
        "<title><img src=x onerror=y>",
        "a\nb",
    ]
    write_folders(folders / "evil", names)
    assert report("evil/pred", "evil/gt", "--guides", "evil/guides", "--inputs", "evil/low") == 0
    page = (folders / "evil" / "pred_report" / "report.html").read_text()
    parser = Links()
    parser.feed(page)
    assert parser.tags.count("script") == 1
    assert "{{ 7*7 }}" in page and "a\\nb" in page
    for link in parser.links:
        assert link.startswith(("data:", f"{PICTURES}/", "#")), link
    assert {row.name for row in read_report(folders / "evil" / "pred_report").good} == set(names)


def test_one_image_and_no_extras(folders, capsys):
    assert report("pred/hall.png", "gt/hall.png", "-o", "one") == 0
    page = (folders / "one" / "report.html").read_text()
    assert "1 image" in page and 'class="plot"' not in page
    assert tree(folders / "one" / PICTURES) == ["00001-error.jpg", "00001-result.jpg", "00001-truth.jpg"]


def test_long_names_keep_the_table_within_80_columns(folders, capsys):
    name = "a-recording-with-a-long-name/and-a-folder-in-it/frame-000123"
    write_png(folders / "pred" / f"{name}.png", prediction(truth(1), 1, 0.5))
    write_png(folders / "gt" / f"{name}.png", truth(1))
    assert report("pred", "gt") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert next(line for line in lines if line.startswith("rmse")).endswith(" ...-in-it/frame-000123")


@pytest.mark.parametrize(("unit", "first"), [("m", "bright"), ("disparity", "dark")])
def test_the_colour_bar_runs_as_the_pictures_do(folders, capsys, unit, first):
    """Near is bright: small metres, large disparities."""
    depth = np.tile(np.linspace(1, 3, 80, dtype=np.float32), (60, 1))
    np.save(folders / "d.npy", depth)
    assert report("d.npy", "d.npy", "--unit", unit, "-o", "one") == 0
    page = (folders / "one" / "report.html").read_text()
    stops = re.search(r"\.bar-depth\{background:linear-gradient\(to right,([^)]*)\)", page)[1].split(",")
    ends = [sum(int(stop[at : at + 2], 16) for at in (1, 3, 5)) for stop in (stops[0], stops[-1])]
    with Image.open(folders / "one" / PICTURES / "00001-result.jpg") as picture:
        row = np.array(picture.convert("RGB")).astype(int)[30].sum(axis=1)
    assert (row[2] > row[-3]) == (ends[0] > ends[1]) == (first == "bright")
