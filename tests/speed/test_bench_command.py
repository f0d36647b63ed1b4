"""``ddfup bench``: options, tables, JSON, exit codes."""

import json
import os
import re

import pytest
import torch

from ddfup import cli
from ddfup.models import list_models
from ddfup.speed import run as speed_run
from ddfup.speed.results import PARTS, Row
from ddfup.speed.timing import Timing

ROW_KEYS = [
    *("part", "case", "method", "direction", "threads", "median_s", "low_s", "high_s", "cpu_s", "rounds", "bytes"),
    *("bytes_per_s", "copy_bytes_per_s", "roofline", "peak_bytes", "pixels", "pixels_per_s"),
]
MACHINE_KEYS = [
    *("ddfup", "torch", "python", "platform", "processor", "cores", "device", "kernels", "kernels_reason"),
]

# What conftest.py, or whoever runs the suite, asks for.
KERNELS = os.environ["DDFUP_KERNELS"]


@pytest.fixture
def run(capfd):
    def call(*arguments):
        code = cli.main(["bench", *map(str, arguments)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def test_everything_quickly(run, tmp_path, weights):
    file = tmp_path / "speed.json"
    arguments = ("--quick", "--device", "cpu", "--threads", 1, "--model", weights, "--size", "64x48", "--ratio", 4)
    code, out, err = run(*arguments, "--json", "-o", file)
    assert code == 0, err
    record = json.loads(out)
    assert list(record) == ["out", "status", "error", "machine", "settings", "rows"]
    assert (record["status"], record["error"], record["out"]) == ("ok", None, str(file))
    assert json.loads(file.read_text()) == record
    assert list(record["machine"]) == MACHINE_KEYS and record["machine"]["torch"] == torch.__version__
    assert record["machine"]["kernels"] == KERNELS
    assert record["settings"]["size"] == [64, 48] and record["settings"]["device"] == "cpu"
    assert list(dict.fromkeys(row["part"] for row in record["rows"])) == list(PARTS)
    for row in record["rows"]:
        assert list(row) == ROW_KEYS
        assert 0 < row["low_s"] <= row["median_s"] <= row["high_s"] and row["rounds"] >= 1 and row["threads"] == 1
        if row["bytes"] is not None:
            assert row["bytes_per_s"] == pytest.approx(row["bytes"] / row["median_s"])
            assert row["roofline"] == pytest.approx(row["bytes_per_s"] / row["copy_bytes_per_s"])
        if row["part"] in ("network", "end-to-end"):
            assert row["method"] == "tiny.safetensors" and row["pixels"] == 64 * 48
            assert row["pixels_per_s"] == pytest.approx(row["pixels"] / row["median_s"])
    # The command does what the network does, and starts first.
    whole, network = (next(row for row in record["rows"] if row["part"] == part) for part in PARTS[:1:-1])
    assert whole["median_s"] > network["median_s"] and whole["cpu_s"] > network["cpu_s"]


def test_tables_fit_the_terminal(run):
    code, out, err = run("--quick", "--part", "op", "--part", "module", "--device", "cpu", "--threads", 1)
    assert code == 0, err
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("ddf") for line in lines) == 2 and sum("(1, 32, 20, 30)" in line for line in lines) == 1
    assert re.search(r"^forward +op .* 1\.00$", out, re.MULTILINE)
    assert re.fullmatch(rf"cpu, .+, \d+ cores, torch .+, {KERNELS} kernels\n", err)


def test_long_figures_fit_too(run, monkeypatch):
    """The largest shapes and slowest times that a slow machine may give."""
    slow = Timing(22.5341, 20.1931, 24.1742, 33.0, 5)
    kinds = {"bytes": 6_000_000_000, "copy": 1e9, "peak": 6_000_000_000, "pixels": 100_000_000, "paper": (82.6, 1)}
    case = "ddf_up x2 (1, 64, 1080, 1920) K 3 float32"
    rows = [
        *(
            Row("op", case, name, way, 64, slow, **kinds)
            for way in ("forward", "backward")
            for name in ("op", "x" * 16)
        ),
        Row("module", "(32, 256, 224, 224) float32", "DDF module", "forward", 64, slow, **kinds),
        Row("network", "11552x8664, ratio 8, fp32", "ddfupnet-x16", "forward", 64, slow, **kinds),
    ]
    monkeypatch.setattr(speed_run, "run", lambda settings: iter(rows))
    code, out, _ = run("--device", "cpu")
    assert code == 0 and max(map(len, out.splitlines())) <= 80


def test_defaults(run, monkeypatch):
    seen = []
    monkeypatch.setattr(speed_run, "run", lambda settings: seen.append(settings) or iter(()))
    assert run("--device", "cpu")[0] == run("--device", "cpu", "--quick", "--part", "op,network")[0] == 0
    assert [(s.parts, s.size, s.ratio, s.dtype, s.models) for s in seen] == [
        (PARTS, (640, 480), 8, "float32", ()),
        (("op", "network"), (128, 96), 8, "float32", ()),
    ]


def test_every_bundled_model_is_measured_with_one_and_all_threads(monkeypatch):
    tasks = []
    monkeypatch.setattr(speed_run.network, "bench", lambda task: tasks.append(task) or iter(()))
    list(speed_run.run(speed_run.Settings(parts=("network",), device="cpu", threads=3)))
    assert [task.model for task in tasks] == [info.name for info in list_models()]
    assert {(task.threads, task.size, task.ratio, task.precision) for task in tasks} == {
        ((1, 3), (640, 480), 8, "fp32")
    }


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--part", "gpu"), 2, "--part must be one of op, module, network, end-to-end, export; got 'gpu'"),
        (("--size", "640"), 2, "--size must be WIDTHxHEIGHT; got '640'"),
        (("--size", "4x4"), 2, "the guide must be larger than the ratio, 8; got 4x4"),
        (("--ratio", "0.5"), 2, "'--ratio': Input should be greater than or equal to 1"),
        (("--dtype", "float64"), 2, "--dtype of network and end-to-end must be one"),
        (("--model", "nobody"), 7, "no model named 'nobody'"),
        (("--device", "tpu"), 2, "--device must be auto, cpu, cuda or cuda:NUMBER; got 'tpu'"),
        (("-o", "nowhere/speed.json"), 6, "nowhere/speed.json: its folder must exist"),
    ],
    ids=str,
)
def test_what_is_refused_before_any_work(run, monkeypatch, arguments, code, message):
    monkeypatch.setattr(speed_run, "run", lambda settings: pytest.fail("it began"))
    device = () if "--device" in arguments else ("--device", "cpu")
    found, out, err = run(*arguments, *device)
    assert (found, out) == (code, "") and err.startswith("error: ") and message in err
    found, out, _ = run(*arguments, *device, "--json")
    # What the parser refuses never reaches the command.
    assert found == code and (out == "" or json.loads(out)["status"] == "failed")


def test_a_file_is_not_replaced_unasked(run, tmp_path, monkeypatch):
    file = tmp_path / "speed.json"
    file.write_text("mine")
    monkeypatch.setattr(speed_run, "run", lambda settings: iter(()))
    code, out, err = run("-o", file, "--device", "cpu")
    assert (code, out) == (6, "") and "must not exist yet" in err and file.read_text() == "mine"
    assert run("-o", file, "--device", "cpu", "--overwrite")[0] == 0
    assert json.loads(file.read_text())["rows"] == []
