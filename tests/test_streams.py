"""Stdout that takes nothing, stderr that is closed, and signals: what is said, and the exit code."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import CHECKOUT, DRIVER, fake, folder, run  # noqa: F401

UPSAMPLE = ("upsample", "depth.png", "guide.jpg", "--json")
# Commands by what prints: our JSON, lines and tables, bytes, typer.
PRINTING = {
    "json": UPSAMPLE,
    "lines": ("info", "depth.png"),
    "table": ("models",),
    "bytes": (*UPSAMPLE[:3], "-o", "-"),
    "version": ("--version",),
    "help": ("upsample", "--help"),
}


def start(arguments, redirect="", **settings):
    """Run the command line in a shell that redirects its streams, which are buffered as usual."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    code = DRIVER + "sys.exit(main())"
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirect}', "bash", sys.executable, "-c", code, Path(__file__).parent, *arguments],
        env={**environment, "PYTHONPATH": str(CHECKOUT)},
        timeout=120,
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | settings),
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("kind", PRINTING)
def test_a_stdout_without_space_is_an_output_error(folder, kind):  # noqa: F811
    done = start(PRINTING[kind], "> /dev/full")
    assert done.returncode == 6, done.stderr
    lines = [line for line in done.stderr.decode().splitlines() if not line.startswith("wrote ")]
    assert lines[0] == "error: stdout must take the output; got No space left on device"
    assert len(lines) == 2 and lines[1].startswith("hint: ")


@pytest.mark.parametrize("kind", PRINTING)
def test_a_reader_that_went_away_ends_the_work_without_a_word(folder, kind):  # noqa: F811
    read, write = os.pipe()
    os.close(read)
    done = start(PRINTING[kind], stdout=write)
    os.close(write)
    assert done.returncode == 141
    assert all(line.startswith(b"wrote ") for line in done.stderr.splitlines()), done.stderr


@pytest.mark.parametrize("kind", ["json", "bytes"])
def test_a_closed_stdout_is_an_output_error(folder, kind):  # noqa: F811
    done = start(PRINTING[kind], ">&-")
    assert done.returncode == 6 and b"error: stdout must take the output; it is closed\nhint: " in done.stderr


@pytest.mark.parametrize("redirect", ["2>&-", "2> /dev/full", "2< /dev/null", "< /dev/null 0>&- 2>&-"])
def test_a_stderr_that_takes_nothing_changes_nothing(folder, redirect):  # noqa: F811
    done = start(UPSAMPLE, redirect)
    record = json.loads(done.stdout)
    assert (done.returncode, record["status"], record["error"]) == (0, "ok", None)
    assert Path("depth_up.png").read_bytes().startswith(b"\x89PNG")


def test_what_went_wrong_first_is_what_is_told(folder):  # noqa: F811
    done = start(("upsample", "none.png", "guide.jpg", "--json"), ">&-")
    assert done.returncode == 4 and done.stderr.startswith(b"error: none.png: must exist; there is no such file")


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_while_loading_is_said(folder, fake, run, monkeypatch, number, expected):  # noqa: F811
    monkeypatch.setattr(fake, "__init__", lambda self, *arguments, **options: os.kill(os.getpid(), number))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, out, err = run(*UPSAMPLE)
        assert (code, err) == (expected, "interrupted\n") and json.loads(out)["error"] == "interrupted"
        assert run("demo", "-o", "new/demo") == (expected, "", "interrupted\n")
        assert not Path("new").exists()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_batch_that_is_interrupted_while_loading_says_so(folder, run, monkeypatch, number, expected):  # noqa: F811
    for place in ("depths", "guides"):
        Path(place).mkdir()
    Path("depth.png").rename("depths/a.png")
    Path("guide.jpg").rename("guides/a.jpg")
    monkeypatch.setattr("ddfup.batch.pool.make_pool", lambda *arguments: os.kill(os.getpid(), number))
    code, _, err = run("batch", "depths", "guides", "out")
    assert code == expected and err.splitlines()[-1] == "interrupted"
