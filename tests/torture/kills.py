"""Processes that are killed or told to stop: P1 whole files, P3 the same as one clean run, P13 a clean stop."""

import json
import random
import subprocess
import sys
import time

import numpy as np

from torture import batches
from torture.table import Line, environment, verdict

_SIZES = {"kinds": batches.ALL_FORMATS, "low": (60, 80), "factor": 4}


def p1(counts, folder):
    """A file with its final name is whole, and a re-run equals one clean run."""
    tries, broken = batches.break_often(_made(folder / "direct"), counts.kills // 10, seed=counts.seed, **_SIZES)
    done = f"{tries} SIGKILLs of direct writes, so that the test is seen to see"
    yield Line("P1", done, f"{broken} broke a file", broken > 0)
    lines = []
    for what, times, arguments in (
        ("6 formats", counts.kills, ()),
        ("6 formats with previews", max(1, counts.kills // 20), ("--preview", "out/look")),
    ):
        faults, result = [], batches.Kills()
        place = _made(folder / what)
        try:
            result = batches.kill_often(
                place, times, count=12, seed=counts.seed, seconds=0, arguments=arguments, **_SIZES
            )
        except AssertionError as error:
            faults.append(str(error))
        figure = f"{'some' if faults else 0} broken of {result.outputs} outputs read again"
        yield verdict("P1", f"{result.hits} SIGKILLs of ddfup batch, {what}", figure, faults)
        same = "differs" if faults else "as one clean run, byte for byte"
        lines.append(verdict("P3", f"a last run after these {result.hits} kills", same, faults))
    yield from lines
    yield from _reports(counts, folder / "reports")


def _made(folder):
    folder.mkdir()
    return folder


def _reports(counts, folder):
    """Kill `ddfup report` while it replaces an older report."""
    folder.mkdir()
    for name in ("a", "b"):
        for index in range(12):
            path = folder / name / f"{index}.npy"
            path.parent.mkdir(exist_ok=True)
            np.save(path, np.random.default_rng(index).uniform(1, 5, (60, 80)).astype(np.float32))
    command = [sys.executable, "-m", "ddfup", "report", "a", "b", "-o", "out", "--overwrite", "-q", "--json"]
    settings = {"cwd": folder, "env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    subprocess.run(command, check=True, **settings)
    moments, faults, hits = random.Random(counts.seed), [], 0
    tries = max(2, counts.kills // 10)
    for _ in range(tries):
        child = subprocess.Popen(command, **settings)
        with child:
            # When the pairs are done, the files are written.
            for _ in range(12):
                child.stdout.readline()
            time.sleep(moments.uniform(0, 0.3))
            child.kill()
            child.communicate()
        hits += child.returncode == -9
        try:
            content = json.loads((folder / "out/metrics.json").read_text())
            assert len(content["images"]) == 12 and (folder / "out/metrics.csv").read_text().count("\n") == 13
            assert (folder / "out/report.html").read_text().rstrip().endswith("</html>")
        except (OSError, ValueError, AssertionError) as error:
            faults.append(f"report: {error!r}")
    yield Line(
        "P1", f"{hits} SIGKILLs of ddfup report over an older one", f"{len(faults)} broken files", not faults, faults
    )


def p13(counts, folder):
    """A clean stop on signals."""
    faults, longest = [], float("nan")
    try:
        longest = batches.interrupt_often(folder, counts.signals, seed=counts.seed)
    except AssertionError as error:
        faults.append(str(error))
    # How long it took is for the full run to say; in the suite a busy machine must not matter.
    fine = not faults and (longest <= 2.2 or counts.signals < 20)
    figure = f"at most {longest:.2f} s (0.2 s of it one inference), nothing left"
    yield Line("P13", f"{counts.signals} x SIGINT / SIGTERM at random", figure, fine, faults)
