"""Scenes for a batch, a command line with a stand-in for the network, and runs of kills and signals."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from depth_files import exr, npz, pfm
from PIL import Image

CHECKOUT = Path(__file__).resolve().parents[2]
FORMATS = ("png", "npy", "tif")
ALL_FORMATS = (*FORMATS, "exr", "pfm", "npz")

# Loads no PyTorch, so that a process is at work after half a second.
DRIVER = """
import os, sys, time
import numpy as np
from ddfup import cli, models
from ddfup.batch import pool

class Nearest:
    model_name, weights_sha256, device, kernels = "nearest", "5eed", "cpu", "none"

    def __call__(self, depth, guide, *, valid=None, fill=False):
        time.sleep(float(os.environ.get("SECONDS_EACH", "0")))
        if meet := os.environ.get("MEET"):
            # Nobody gets ahead before two processes are at work.
            open(f"{meet}/{os.getpid()}", "a").close()
            while len(os.listdir(meet)) < 2:
                time.sleep(0.02)
        height, width = guide.shape[:2]
        rows, columns = np.arange(height) * depth.shape[0] // height, np.arange(width) * depth.shape[1] // width
        return np.where(valid, depth, np.nan).astype(np.float32)[np.ix_(rows, columns)]

if os.environ.get("SLOW_DISK"):
    # So that a kill comes while something is written, not while it is computed.
    sync = os.fsync
    os.fsync = lambda file: (time.sleep(0.01), sync(file))

if os.environ.get("DIRECT"):
    # What other tools do: straight into the file of the final name.
    def write(files):
        for path, data in files.items():
            with open(path, "wb", buffering=0) as stream:
                half = len(data) // 2
                stream.write(data[:half])
                time.sleep(0.01)
                stream.write(data[half:])

    from ddfup import writing

    writing.write_files = write

pool.make_pool = lambda *arguments: pool.LocalPool(Nearest())
models.find_model = lambda name: models.ModelInfo("nearest", "none", None, 1, "5eed", "", {})
"""
MAIN = DRIVER + "sys.exit(cli.main())"


def write_pair(folder, name, *, kind="png", low=(6, 8), factor=4, seed=0):
    """Write depths/<name>.<kind> and guides/<name>.jpg, unlike those of any other name."""
    depth, guide = folder / "depths" / f"{name}.{kind}", folder / "guides" / f"{name}.jpg"
    for path in (depth, guide):
        path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng([seed, *name.encode()])
    values = generator.integers(500, 6000, low).astype(np.uint16)
    metres = values.astype(np.float32) / 1000
    if kind == "png":
        Image.fromarray(values).save(depth)
    elif kind == "npy":
        np.save(depth, metres)
    elif kind == "tif":
        import tifffile

        tifffile.imwrite(depth, metres)
    else:
        make = {"exr": lambda: exr({"Z": metres}), "pfm": lambda: pfm(metres), "npz": lambda: npz(depth=metres)}
        depth.write_bytes(make[kind]())
    picture = generator.integers(0, 255, (low[0] * factor, low[1] * factor, 3), dtype=np.uint8)
    Image.fromarray(picture).save(guide, quality=90)
    return depth, guide


def write_scene(folder, count, *, kinds=FORMATS, **settings):
    for index in range(count):
        write_pair(folder, f"room{index % 3}/{index:04}", kind=kinds[index % len(kinds)], **settings)


def tree(folder, *, hidden=True):
    """Hash of every file below a folder; without ``hidden``, the batch's own state is left out."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and (hidden or ".ddfup" not in path.relative_to(folder).parts)
    }


def start(folder, *arguments, seconds=0.0, meet="", direct=False, **settings):
    """Begin a batch of a scene in a process of its own; ``direct``: with writes that are not atomic."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "SECONDS_EACH": str(seconds), "MEET": str(meet)}
    environment |= {"DIRECT": "1" if direct else "", "SLOW_DISK": "1"}
    command = [sys.executable, "-c", MAIN, "batch", "depths", "guides", "out", *arguments]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    return subprocess.Popen(command, cwd=folder, env=environment, **settings)


def finish(child, timeout=120):
    with child:
        out, err = child.communicate(timeout=timeout)
    return child.returncode, out.decode(), err.decode()


def broken_files(folder):
    """Files under their final names that their readers refuse."""
    from ddfup import io
    from ddfup.errors import InputError

    broken = []
    for path in folder.rglob("*"):
        if path.is_file() and ".ddfup" not in path.parts and not path.name.endswith(".tmp"):
            try:
                (io.read_guide if path.suffix == ".jpg" else io.read_depth)(path)
            except InputError:
                broken.append(path)
    return broken


def check_whole(folder):
    """Every file under its final name is one that a reader takes; none is torn."""
    broken = broken_files(folder)
    assert not broken, f"torn: {broken}"


@dataclass
class Kills:
    """What came of killing a batch again and again.

    Attributes:
        hits: Kills that hit a process at work.
        outputs: Files under their final names that were read again after a kill, all in all.
        left: Pairs that were left for the last run.
    """

    hits: int = 0
    outputs: int = 0
    left: int = 0


def kill_often(folder, times, *, count=24, seed=0, seconds=0.01, arguments=(), **scene):
    """Kill a batch at random moments, then finish it; all that is promised of that is asserted."""
    write_scene(folder, count, **scene)
    clean = folder / "clean"
    for name in ("depths", "guides"):
        shutil.copytree(folder / name, clean / name)
    child = start(clean, "--json", *arguments, seconds=seconds)
    with child:
        child.stdout.readline()
        begin = time.monotonic()
        err = child.communicate(timeout=120)[1]
        longest = time.monotonic() - begin
    assert child.returncode == 0, err
    expected, inputs = tree(clean / "out", hidden=False), tree(folder / "depths")
    assert sum(not name.endswith(".jpg") for name in expected) == count
    moments = random.Random(seed)
    result = Kills()
    while result.hits < times:
        if result.left == 0:
            # All is done: begin anew, so that every kill has something to hit.
            shutil.rmtree(folder / "out", ignore_errors=True)
            result.left = count
        child = start(folder, "--json", *arguments, seconds=seconds, text=True)
        with child:
            # Some time after the first pair; importing is not what is to be hit.
            first = child.stdout.readline()
            time.sleep(moments.uniform(0, longest))
            child.send_signal(signal.SIGKILL)
            done = [json.loads(line) for line in [first, *child.stdout.readlines()] if line.endswith("}\n")]
            error = child.stderr.read()
        assert "error" not in error, error
        result.hits += child.returncode == -signal.SIGKILL
        check_whole(folder / "out")
        now = {name: hashed for name, hashed in tree(folder / "out", hidden=False).items() if not name.endswith(".tmp")}
        assert all(now[name] == expected[name] for name in now), "a changed output"
        result.outputs += len(now)
        made = [name for name in now if not name.endswith(".jpg")]
        result.left = count - len(made)
        assert result.left + len({r["out"] for r in done if r["status"] != "failed"}) <= count, "done, but not there"
    # What kills left is removed when it is old: a young one may be somebody's at work.
    for path in (folder / "out").rglob(".ddfup-*.tmp"):
        os.utime(path, (1, 1))
    missing = count - len(complete(folder / "out", expected))
    code, out, err = finish(start(folder, "--json", *arguments))
    assert code == 0, err
    assert tree(folder / "out", hidden=False) == expected, "not what one clean run gives, or something left over"
    written = sum(json.loads(line)["status"] == "ok" for line in out.splitlines())
    assert written == missing, f"{missing} outputs were missing, {written} were made"
    assert tree(folder / "depths") == inputs
    return result


def complete(folder, expected):
    """Outputs that are there with all that belongs to them."""
    now = tree(folder, hidden=False)
    previews = {name for name in expected if name.endswith(".jpg")}
    return [
        name
        for name in expected
        if name not in previews and name in now and all(p in now for p in previews if p.endswith(f"/{name}.jpg"))
    ]


def break_often(folder, times, *, count=12, seed=0, **scene):
    """Kill a batch that writes straight into its outputs: shows that a torn file would be seen.

    Returns:
        Number of kills (more than ``times`` if none of these broke anything, but not for ever), and of those that
        left a torn file.
    """
    write_scene(folder, count, **scene)
    moments, broken, tries = random.Random(seed), 0, 0
    while tries < times or (not broken and tries < times + 30):
        tries += 1
        shutil.rmtree(folder / "out", ignore_errors=True)
        child = start(folder, "--json", direct=True)
        with child:
            child.stdout.readline()
            time.sleep(moments.uniform(0, 0.1))
            child.send_signal(signal.SIGKILL)
            child.communicate()
        broken += bool(broken_files(folder / "out"))
    return tries, broken


def interrupt_often(folder, times, *, count=16, seed=0, seconds=0.2):
    """Send SIGINT or SIGTERM at random moments.

    Returns:
        The longest time in seconds from a signal to the end of the process.
    """
    write_scene(folder, count)
    moments, longest, hits, tries = random.Random(seed), 0.0, 0, 0
    while hits < times:
        tries += 1
        assert tries <= 2 * times + 10, "the batch ends before it can be stopped"
        shutil.rmtree(folder / "out", ignore_errors=True)
        number = (signal.SIGINT, signal.SIGTERM)[hits % 2]
        child = start(folder, "--json", seconds=seconds)
        with child:
            first = child.stdout.readline()
            time.sleep(moments.uniform(0, 2 * seconds))
            begin = time.monotonic()
            child.send_signal(number)
            # Not by communicate, which knows nothing of what came with the first line.
            out, err = child.stdout.read(), child.stderr.read()
            child.wait(timeout=60)
            lasted = time.monotonic() - begin
        records = [json.loads(line) for line in (first + out).splitlines()]
        if child.returncode == 0 and len(records) == count:
            continue  # this machine was so busy that all was done before the signal came
        hits, longest = hits + 1, max(longest, lasted)
        assert child.returncode == 128 + number, err
        assert b"Traceback" not in err and b"not reached" in err, err
        assert {record["status"] for record in records} == {"ok"}
        names = tree(folder / "out", hidden=False)
        assert not [name for name in names if name.endswith(".tmp")]
        assert len(names) == len(records) < count, "an output without its record, or nothing was stopped"
        check_whole(folder / "out")
    return longest
