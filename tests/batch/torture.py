"""Scenes for a batch, a command line with a stand-in for the network, and the long runs of kills and signals.

`python tests/batch/torture.py --kills 200 --signals 100` is the full run; the suite does a few of each.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

CHECKOUT = Path(__file__).resolve().parents[2]
FORMATS = ("png", "npy", "tif")

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
    if kind == "png":
        Image.fromarray(values).save(depth)
    elif kind == "npy":
        np.save(depth, values.astype(np.float32) / 1000)
    else:
        import tifffile

        tifffile.imwrite(depth, values.astype(np.float32) / 1000)
    picture = generator.integers(0, 255, (low[0] * factor, low[1] * factor, 3), dtype=np.uint8)
    Image.fromarray(picture).save(guide, quality=90)
    return depth, guide


def write_scene(folder, count):
    for index in range(count):
        write_pair(folder, f"room{index % 3}/{index:04}", kind=FORMATS[index % 3])


def tree(folder, *, hidden=True):
    """Hash of every file below a folder; without ``hidden``, the batch's own state is left out."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and (hidden or ".ddfup" not in path.relative_to(folder).parts)
    }


def start(folder, *arguments, seconds=0.0, meet="", **settings):
    """Begin a batch of a scene in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "SECONDS_EACH": str(seconds), "MEET": str(meet)}
    command = [sys.executable, "-c", MAIN, "batch", "depths", "guides", "out", *arguments]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    return subprocess.Popen(command, cwd=folder, env=environment, **settings)


def finish(child, timeout=120):
    with child:
        out, err = child.communicate(timeout=timeout)
    return child.returncode, out.decode(), err.decode()


def check_whole(folder):
    """Every file under its final name is one that a reader takes; none is torn."""
    from ddfup import io

    for path in folder.rglob("*"):
        if path.is_file() and ".ddfup" not in path.parts and not path.name.endswith(".tmp"):
            io.read_depth(path)


def kill_often(folder, times, *, count=24, seed=0, seconds=0.01):
    """Kill a batch at random moments, then finish it.

    Returns:
        Number of kills that hit a process at work, and of pairs that were left for the last run.
    """
    write_scene(folder, count)
    clean = folder / "clean"
    shutil.copytree(folder / "depths", clean / "depths")
    shutil.copytree(folder / "guides", clean / "guides")
    code, _, err = finish(start(clean))
    assert code == 0, err
    expected, inputs = tree(clean / "out", hidden=False), tree(folder / "depths")
    assert len(expected) == count
    moments = random.Random(seed)
    hits = left = 0
    while hits < times:
        if left == 0:
            # All is done: begin anew, so that every kill has something to hit.
            shutil.rmtree(folder / "out", ignore_errors=True)
            left = count
        child = start(folder, "--json", seconds=seconds, text=True)
        with child:
            # Some time after the first pair; importing is not what is to be hit.
            first = child.stdout.readline()
            time.sleep(moments.uniform(0, seconds * count))
            child.send_signal(signal.SIGKILL)
            done = [json.loads(line) for line in [first, *child.stdout.readlines()] if line.endswith("}\n")]
            error = child.stderr.read()
        assert "error" not in error, error
        hits += child.returncode == -signal.SIGKILL
        check_whole(folder / "out")
        now = tree(folder / "out", hidden=False)
        assert all(now[name] == expected[name] for name in now if not name.endswith(".tmp")), "a changed output"
        left = count - sum(not name.endswith(".tmp") for name in now)
        assert left + len({r["out"] for r in done if r["status"] != "failed"}) <= count, "done, but not there"
    code, out, err = finish(start(folder, "--json"))
    assert code == 0, err
    assert tree(folder / "out", hidden=False) == expected, "not what one clean run gives, or something left over"
    written = sum(json.loads(line)["status"] == "ok" for line in out.splitlines())
    assert written == left, f"{left} outputs were missing, {written} were made"
    assert tree(folder / "depths") == inputs
    return hits, left


def interrupt_often(folder, times, *, count=16, seed=0, seconds=0.2):
    """Send SIGINT or SIGTERM at random moments.

    Returns:
        The longest time in seconds from a signal to the end of the process.
    """
    write_scene(folder, count)
    moments, longest = random.Random(seed), 0.0
    for index in range(times):
        shutil.rmtree(folder / "out", ignore_errors=True)
        number = (signal.SIGINT, signal.SIGTERM)[index % 2]
        child = start(folder, "--json", seconds=seconds)
        with child:
            first = child.stdout.readline()
            time.sleep(moments.uniform(0, 2 * seconds))
            begin = time.monotonic()
            child.send_signal(number)
            out, err = child.communicate(timeout=60)
            longest = max(longest, time.monotonic() - begin)
        assert child.returncode == 128 + number, err
        assert b"Traceback" not in err and b"not reached" in err, err
        records = [json.loads(line) for line in (first + out).splitlines()]
        assert {record["status"] for record in records} == {"ok"}
        names = tree(folder / "out", hidden=False)
        assert not [name for name in names if name.endswith(".tmp")]
        assert len(names) == len(records) < count, "an output without its record, or nothing was stopped"
        check_whole(folder / "out")
    return longest


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--signals", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2)]
        hits, left = kill_often(folders[0], options.kills, seed=options.seed)
        print(f"{hits} kills: 0 broken files, nothing left over, last run ({left} pairs) as one clean run")
        longest = interrupt_often(folders[1], options.signals, seed=options.seed)
        print(f"{options.signals} signals: at most {longest:.2f} s to the end (0.2 s of it one inference)")


if __name__ == "__main__":
    sys.path.insert(0, str(CHECKOUT))
    main()
