"""``ddfup benchmark``: options, table, files, progress, exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from networks import tiny_pyramid
from scenes import write_dataset

import ddfup
from ddfup import cli, models
from ddfup.benchmark.baselines import BASELINES

FEW = ("--factor", "4", "--method", "bicubic")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a data set, and one bundled model."""
    write_dataset(tmp_path / "room")
    models.save_weights(
        tmp_path / "weights" / "tiny.safetensors",
        tiny_pyramid(),
        architecture="pyramid",
        name="tiny",
        description="a test",
    )
    monkeypatch.setattr(models, "resource_dir", lambda name: tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capfd):
    def call(*arguments):
        code = cli.main(["benchmark", *map(str, arguments)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def test_everything_by_default(folder, run):
    code, out, err = run("room", "--device", "cpu", "-o", "out", "--factor", "4", "--factor", "8")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "RMSE (cm), bicubic low resolution" and lines[1].split() == ["method", "x4", "x8"]
    assert [line.split()[0] for line in lines[2:]] == [*BASELINES, "tiny"]
    assert max(map(len, lines)) <= 80
    assert err.splitlines() == [
        "mean over 3 images, protocol bicubic, border of 6 px not counted",
        *(f"wrote out/{name}" for name in ("benchmark.html", "benchmark.json", "images.csv", "means.csv")),
    ]
    content = json.loads((folder / "out" / "benchmark.json").read_text())
    assert [(cell["method"], cell["factor"]) for cell in content["means"]] == [
        (method, factor) for factor in (4.0, 8.0) for method in [*BASELINES, "tiny"]
    ]
    assert len(content["images"]) == 3 * 2 * 8 and content["networks"][0]["name"] == "tiny"
    table = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    for cell in content["means"]:
        assert table[cell["method"]][[4, 8].index(cell["factor"])] == f"{cell['rmse']:.2f}"
    assert len((folder / "out" / "images.csv").read_text().splitlines()) == 1 + 48
    assert len((folder / "out" / "means.csv").read_text().splitlines()) == 1 + 16


def test_the_page_is_whole_and_inert(folder, run):
    hostile = folder / "<img src=x onerror=alert(1)>"
    (folder / "room").rename(hostile)
    code, _, err = run(hostile.name, *FEW, "-o", "out", "-q", "--protocol", "holes", "--factor", "4")
    assert code == 0, err
    page = (folder / "out" / "benchmark.html").read_text("utf-8")
    assert "<img" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", page)
    cells = json.loads((folder / "out" / "benchmark.json").read_text())["means"]
    for cell in cells:
        assert f">{cell['rmse']:.2f}<" in page and f">{cell['hole_rmse']:.2f}<" in page
    assert "Hole RMSE" in page


def test_json_is_one_object(folder, run):
    code, out, err = run("room", *FEW, "--json", "-q", "--limit", 2)
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert (record["status"], record["error"], record["protocol"], record["unit"]) == ("ok", None, "bicubic", "cm")
    (cell,) = record["means"]
    assert (cell["method"], cell["factor"], cell["images"]) == ("bicubic", 4.0, 2) and cell["rmse"] > 0
    code, out, err = run("nowhere", "--json")
    assert code == 5 and json.loads(out)["status"] == "failed" and json.loads(out)["error"] in err


def test_tables_of_several_measures_and_degradations(folder, run):
    arguments = ("--degradation", "area,nearest", "--metric", "mae", "--metric", "delta1,ssim", "--limit", 1)
    code, out, _ = run("room", *FEW, *arguments)
    assert code == 0
    titles = [block.splitlines()[0] for block in out.split("\n\n")]
    assert titles == [
        f"{measure}, {kind} low resolution"
        for measure in ("MAE (cm)", "δ < 1.25 (%)", "SSIM")
        for kind in ("area", "nearest")
    ]


def test_options_from_a_file(folder, run):
    (folder / "c.toml").write_text('[benchmark]\nfactor = [4, 7.5]\nmethod = ["nearest", "bicubic"]\nlimit = 1\n')
    code, out, err = run("room", "--config", "c.toml", "--json", "-q")
    assert code == 0, err
    cells = [(cell["method"], cell["factor"]) for cell in json.loads(out)["means"]]
    assert cells == [("nearest", 4.0), ("bicubic", 4.0), ("nearest", 7.5), ("bicubic", 7.5)]


def test_grey_levels(tmp_path, run):
    room = write_dataset(tmp_path / "grey", disparity=True)
    assert run(room, *FEW)[0] == 4, "8-bit files need a unit"
    code, out, err = run(room, *FEW, "--unit", "disparity", "--invalid", "nan", "--metric", "rmse,bad_3")
    assert code == 0 and out.startswith("RMSE (levels), ") and "\nBad > 3 (%), " in out
    assert err == "mean over 3 images, protocol bicubic\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--protocol", "mine"], 2, "--protocol must be one of"),
        (["--factor", "four"], 2, "--factor must be a number; got 'four'"),
        (["--metric", "rmsd"], 2, "--metric must be one of rmse, mae"),
        (["--method", "bicupic"], 2, "--method must be a weight file or one of nearest, bilinear, bicubic"),
        (["--method", "bicupic.safetensors"], 7, "bicupic.safetensors"),
        (["--first", "3"], 5, "no image from --first 3 on"),
        (["--device", "gpu"], 2, "--device must be"),
        (["--precision", "fp16", "--device", "cpu", "--method", "tiny"], 2, "precision fp16 is for GPUs"),
    ],
)
def test_refusals(folder, run, arguments, code, message):
    status, out, err = run("room", *arguments)
    assert (status, out) == (code, "") and message in err and "Traceback" not in err


def test_an_unreadable_image_is_named_before_any_work(folder, run):
    data = (folder / "room" / "depth" / "02.png").read_bytes()
    (folder / "room" / "depth" / "02.png").write_bytes(data[: len(data) // 2])
    code, out, err = run("room", *FEW, "-o", "out", "--json")
    assert code == 4 and err.startswith("error: room/depth/02.png: ") and json.loads(out)["status"] == "failed"
    assert not (folder / "out").exists()


def test_nothing_is_overwritten_unasked(folder, run):
    (folder / "out").mkdir()
    (folder / "out" / "means.csv").write_text("mine")
    code, out, err = run("room", *FEW, "-o", "out")
    assert (code, out) == (6, "") and "out/means.csv: must not exist yet" in err
    assert (folder / "out" / "means.csv").read_text() == "mine"
    assert run("room", *FEW, "-o", "out", "--overwrite")[0] == 0
    assert (folder / "out" / "means.csv").read_text().startswith("degradation,")
    code, _, err = run("room", *FEW, "-o", "room/depth/00.png")
    assert code == 6 and "must be a folder or become one" in err


def test_progress_is_told(folder, run, monkeypatch):
    monkeypatch.setattr("ddfup.terminal._LINE_SECONDS", 0.0)
    _, _, err = run("room", *FEW)
    assert [line.split(",")[0] for line in err.splitlines()[:3]] == ["1/3", "2/3", "3/3"]
    assert err.splitlines()[2].endswith("02: bicubic x4")


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from ddfup.cli import main; code = main(['benchmark', '--help']);"
        "heavy = {'torch', 'numpy', 'cv2', 'PIL', 'rich'} & set(sys.modules);"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(ddfup.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    help_text = b" ".join(done.stdout.split())
    for name in BASELINES:
        assert name.encode() in help_text.replace(b"- ", b"-"), name
