"""``ddfup train``: options, progress, JSON, signals, exit codes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sets import CONFIG, write_data

import ddfup
from ddfup import cli, models

CHECKOUT = Path(ddfup.__file__).parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_data(tmp_path / "data")
    (tmp_path / "c.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capfd):
    def call(*arguments):
        code = cli.main(["train", *map(str, arguments)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


COMMON = ("c.toml", "--data", "data", "--out", "run", "--device", "cpu", "--workers", "0")


def test_a_run_ends_with_weights_and_one_line(folder, run):
    code, out, err = run(*COMMON)
    assert (code, out) == (0, "")
    assert re.fullmatch(r"training tiny on cpu: step 0 of 6\nwrote run/pyramid_tiny\.safetensors at step 6 of 6\n", err)
    assert models.load_model(folder / "run" / "pyramid_tiny.safetensors")


def test_json_and_resumption(folder, run):
    code, out, err = run(*COMMON, "--json", "-q", "--max-minutes", "0")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert (record["status"], record["step"], record["steps"], record["error"]) == ("stopped", 1, 6, None)
    assert record["weights"] == "run/pyramid_tiny.safetensors" and record["device"] == "cpu"
    code, out, err = run(*COMMON, "--json", "--resume")
    record = json.loads(out)
    assert (code, record["status"], record["step"]) == (0, "ok", 6)
    assert set(record["tune"]) == {f"{kind} x{s}" for kind in ("bicubic", "nearest") for s in (4, 8, 16)}
    assert "step 1 of 6" in err


def test_stopping_early_says_how_to_go_on(folder, run):
    code, _, err = run(*COMMON, "--max-minutes", "0")
    assert code == 0 and "stopped early: --resume continues" in err


def test_only_the_first_process_tells(folder, run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    code, out, err = run(*COMMON, "--json")
    assert (code, out, err) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("none.toml", *COMMON[1:]), 4, "error: none.toml: cannot read the training configuration"),
        (COMMON[:1], 2, "error: Missing option '--data'"),
        ((*COMMON, "--resume"), 4, "no checkpoint to resume from"),
        ((*COMMON, "--init", "none"), 7, "no model named 'none'"),
        ((*COMMON, "--data", "elsewhere"), 4, "elsewhere/room: no files in depth/"),
        ((*COMMON, "--out", "c.toml"), 6, "c.toml: cannot be made a folder"),
        ((*COMMON, "--device", "tpu"), 2, "--device must be auto, cpu, cuda or cuda:NUMBER"),
        ((*COMMON, "--workers", "-1"), 2, "--workers"),
        ((*COMMON, "--max-minutes", "-1"), 2, "--max-minutes"),
    ],
)
def test_errors(folder, run, arguments, code, message):
    got, out, err = run(*arguments)
    assert (got, out) == (code, "")
    assert message in err
    got, out, _ = run(*arguments, "--json")
    assert got == code
    if code != 2:
        record = json.loads(out)
        assert record["status"] == "failed" and record["error"] in message + err


def test_a_second_run_in_the_same_folder_is_refused(folder, run):
    run(*COMMON, "--max-minutes", "0")
    before = (folder / "run" / "checkpoint.pt").read_bytes()
    code, _, err = run(*COMMON)
    assert code == 4
    assert "error: run/checkpoint.pt: a run is here already\nhint: continue it with --resume" in err
    assert (folder / "run" / "checkpoint.pt").read_bytes() == before


def test_the_help_lists_the_bundled_configurations(run):
    code, out, _ = run("--help")
    assert code == 0 and re.search(r"bundled configuration:\s+.*\bbase\b", out)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_signal_keeps_the_checkpoint(folder, number, code, workers):
    (folder / "c.toml").write_text(CONFIG.replace("steps = 6", "steps = 100000").replace("tune_every = 4", ""))
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, "train", *COMMON[:-1], workers, "--json"],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    # The driver writes a file after the third step.
    for _ in range(1200):
        if (folder / "third").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    # As a terminal does it: to all processes of the group.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    record = json.loads(out)
    assert record["status"] == "stopped" and record["step"] >= 3
    assert "Traceback" not in err and "stopped early: --resume continues" in err
    assert models.load_model(folder / "run" / "pyramid_tiny.safetensors")
    assert sorted(path.name for path in (folder / "run").iterdir()) == [
        "checkpoint.pt",
        "pyramid_tiny.safetensors",
    ]


DRIVER = """
import sys
from pathlib import Path
from ddfup import cli
from ddfup.training import trainer

plain = trainer.Trainer._train_step

def step(self, batch):
    plain(self, batch)
    if self.step == 3:
        Path("third").touch()

trainer.Trainer._train_step = step
sys.exit(cli.main())
"""
