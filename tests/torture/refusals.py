"""Bad input: P4 a bad pair never stops others, P6 one clear line per failure, P12 stdout is data only."""

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

from torture import batches, cases, catalogue, disks
from torture.batches import tree
from torture.stand_in import call, nearest
from torture.table import Line, environment, verdict


def p4(counts, folder):
    """A bad pair never stops others."""
    pairs = [case for case in cases.cases() if case.is_pair and case.code and not case.network]
    names = [f"good{index}" for index in range(counts.good)] + list(range(len(pairs)))
    random.Random(counts.seed).shuffle(names)
    for place in ("depths", "guides"):
        (folder / place).mkdir()
    for index, name in enumerate(names):
        if isinstance(name, str):
            batches.write_pair(folder, f"{index:04} {name}", kind=batches.ALL_FORMATS[index % 6])
            continue
        case = pairs[name]
        home = folder / "making"
        home.mkdir()
        catalogue.lay(home)
        case.prepare(home)
        slug = re.sub(r"[^a-z0-9]+", "-", case.name.lower())
        for source, place in zip(case.arguments[1:], ("depths", "guides"), strict=True):
            path = home / source
            if os.path.lexists(path):
                # The suffix decides what a file is taken for; without a known one it is in no pair.
                target = folder / place / f"{index:04} bad {slug}{Path(source).suffix}"
                path.rename(target)
                if target.is_symlink() and str(target.readlink()) == source:
                    target.unlink()
                    target.symlink_to(target.name)
        shutil.rmtree(home)
    with nearest():
        result = call(folder, "batch", "depths", "guides", "out", "--json")
    records = result.records
    good = [record for record in records if "good" in record["out"] and record["status"] == "ok"]
    bad = [record for record in records if "bad" in record["out"]]
    faults = []
    if result.code != 3 or len(good) != counts.good:
        faults.append(f"exit code {result.code}, {len(good)} good ones; {result.err[-300:]}")
    if any(record["status"] != "failed" or not record["error"] for record in bad):
        faults += [f"did not fail: {r['depth']}" for r in bad if r["status"] != "failed" or not r["error"]]
    if len(result.lines("error")) != len(bad) or "internal error" in result.err:
        faults.append(f"{len(result.lines('error'))} error lines for {len(bad)} failures")
    if torn := batches.broken_files(folder / "out"):
        faults.append(f"torn: {torn}")
    if sum(path.is_file() for path in (folder / "out").iterdir()) != counts.good:
        faults.append("files beside the results")
    done = f"{counts.good} good pairs + {len(bad)} bad ones of {len(pairs)} cases, shuffled"
    yield verdict("P4", done, f"{len(good)} of {counts.good} done, exit {result.code}", faults)


def p6(counts, folder):
    """One clear line per failure, nothing left over; stdout is data only."""
    verdicts = []
    for number, case in enumerate(cases.cases()):
        home = folder / str(number)
        # In the short form each case takes one way, its neighbour the other.
        ways = (False, True) if counts.good >= 200 else (bool(number % 2),)
        verdicts.append(catalogue.try_case(case, home, ways))
        shutil.rmtree(home, ignore_errors=True)
    faults = [f"{v.case.group}: {v.case.name}: {fault}" for v in verdicts for fault in v.faults]
    wrong = {v.case.name for v in verdicts if v.faults}
    skipped = [v for v in verdicts if v.skipped]
    tried = len(verdicts) - len(skipped)
    note = f", {len(skipped)} skipped ({skipped[0].skipped})" if skipped else ""
    figure = f"{(tried - len(wrong)) / tried:.0%} as promised{note}"
    yield verdict("P6", f"{tried} cases of the catalogue, plainly", figure, faults)
    json_faults = [fault for fault in faults if "JSON" in fault or "json" in fault or "stdout" in fault]
    yield Line(
        "P12",
        f"the same {tried} cases with --json",
        f"{len(json_faults)} with stray output",
        not json_faults,
        json_faults,
    )
    yield from _faulty_disks(folder)
    yield from _stdout(folder)


def _faulty_disks(folder):
    """Processes of their own whose fsync fails, or who may write no large file."""
    home = folder / "fsync"
    batches.write_scene(home, 3)
    try:
        shim = disks.failing_fsync(folder)
    except disks.Unavailable as reason:
        yield Line("P6", "fsync fails with EIO by LD_PRELOAD", f"owed: {reason}", None)
        return
    child = subprocess.run(
        [sys.executable, "-c", batches.MAIN, "batch", "depths", "guides", "out", "--json"],
        cwd=home,
        env=environment(**shim),
        capture_output=True,
        text=True,
    )
    left = list(tree(home / "out", hidden=False))
    errors = [line for line in child.stderr.splitlines() if line.startswith("error: ")]
    fine = child.returncode in (4, 6) and not left and errors and "Input/output error" in errors[0]
    figure = f"exit {child.returncode}, {len(left)} files left"
    yield Line("P6", "fsync fails with EIO by LD_PRELOAD", figure, bool(fine), [] if fine else [child.stderr])


def _stdout(folder):
    """The file itself on stdout: nothing else may be there, and a failure must leave it empty."""
    faults, home = [], folder / "stdout"
    home.mkdir()
    catalogue.lay(home)
    for kind in ("png", "tiff", "exr", "pfm", "npy", "npz"):
        with nearest():
            result = call(home, *catalogue.UPSAMPLE, "--format", kind, "-v", "-o", "-")
        suffix = {"tiff": "tif"}.get(kind, kind)
        (home / f"out.{suffix}").write_bytes(result.out)
        if result.code or batches.broken_files(home):
            faults.append(f"{kind}: {result.code} {result.err}")
        with nearest():
            result = call(home, "upsample", "none.png", "guide.jpg", "-o", "-", "--format", kind)
        if result.out:
            faults.append(f"{kind}: data in spite of a failure")
    yield verdict("P12", "-o - in 6 formats, done and failed", f"{len(faults)} with stray output", faults)
