"""How it starts: P14 without a compiler, P16 without a network, P17 fast."""

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import time

from torture import batches, disks
from torture.batches import CHECKOUT
from torture.table import Line, environment


def p14(counts, folder):
    """The first run needs no compiler."""
    home, cache = folder / "home", folder / "cache"
    for place in (home, cache, folder / "bin", folder / "work"):
        place.mkdir()
    (folder / "bin/python").symlink_to(sys.executable)
    settings = {
        "PATH": str(folder / "bin"),
        "HOME": str(home),
        "PYTHONPATH": str(CHECKOUT),
        "DDFUP_KERNELS": "auto",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder / "work"),
    }
    for index in range(counts.processes):
        batches.write_pair(folder / str(index), "a", low=(60, 80))
    try:
        with disks.read_only(home):
            yield _start_many("no compiler, read-only home", folder, counts.processes, settings)
    except disks.Unavailable:
        home.chmod(0o555)
        yield _start_many("no compiler, home without rights", folder, counts.processes, settings)
        home.chmod(0o755)
    if counts.processes < 8:
        return  # locks and builds have tests of their own
    settings |= {"DDFUP_CACHE_DIR": str(cache)}
    lock = _stale_lock(cache)
    yield _start_many("no compiler, stale lock in the cache", folder, counts.processes, settings)
    settings |= {"PATH": os.environ["PATH"]}
    yield _start_many("compiler, first build, stale lock", folder, counts.processes, settings, most=None)
    if lock.returncode != -9:
        raise RuntimeError("the lock's holder was not killed")


def _stale_lock(cache):
    """Let a process that held the build's lock die."""
    code = """
import os, sys, filelock
from pathlib import Path
from ddfup.ops import native
path = native._library_path("cpu")
filelock.FileLock(path.parent / f"{path.stem}.lock").acquire()
(path.parent / "build-killed").mkdir()
os.kill(os.getpid(), 9)
"""
    return subprocess.run([sys.executable, "-c", code], env=environment(DDFUP_CACHE_DIR=str(cache)), check=False)


def _start_many(what, folder, count, settings, most=30.0):
    """Start so many commands at once, each with a pair of its own; the time is that until the last has ended."""
    command = [
        sys.executable,
        "-m",
        "ddfup",
        "upsample",
        "depths/a.png",
        "guides/a.jpg",
        "--device",
        "cpu",
        "--overwrite",
    ]
    begin, before = time.monotonic(), os.times()
    children = [
        subprocess.Popen(
            [*command, "-o", "r.png"],
            cwd=folder / str(index),
            env=settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    faults, ended, said = [], [], []
    for child in children:
        with child:
            out, err = child.communicate(timeout=600)
        ended.append(time.monotonic() - begin)
        said.append(err)
        if child.returncode or out:
            faults.append(err)
    after = os.times()
    work = after.children_user + after.children_system - before.children_user - before.children_system
    kernels = sorted({"native" if "native kernels)" in err else "torch" for err in said})
    good, slow = count - len(faults), most is not None and count >= 8 and max(ended) > most
    figure = f"{good} of {count} done after {max(ended):.1f} s, {' and '.join(kernels)} kernels, "
    figure += f"{work:.0f} s of CPU together"
    return Line("P14", f"{count} at once: {what}", figure, not faults and not slow, faults)


_WATCH = """
import os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"):
        with open(os.environ["DDFUP_WATCH"], "a") as stream:
            stream.write(f"{event} {arguments[1:]!r}\\n")
sys.addaudithook(watch)
"""


def p16(counts, folder):
    """No network."""
    (folder / "watch").mkdir()
    (folder / "watch/sitecustomize.py").write_text(_WATCH)
    log = folder / "connections"
    settings = environment(DDFUP_WATCH=str(log), OMP_NUM_THREADS="1")
    settings["PYTHONPATH"] = os.pathsep.join((str(folder / "watch"), str(CHECKOUT)))
    home = folder / "work"
    batches.write_scene(home, 2, kinds=("png",))
    full = [
        ("--help",),
        ("models",),
        ("doctor",),
        ("info", "depths/room0/0000.png"),
        ("upsample", "depths/room0/0000.png", "guides/room0/0000.jpg", "-o", "r.png", "--preview", "p.png"),
        ("batch", "depths", "guides", "out"),
        ("report", "out", "out", "-o", "rep"),
        ("demo", "-o", "demo"),
        ("train", "--help"),
    ]
    commands = full if counts.starts >= 10 else [full[3], full[4]]
    without = _without_network()
    faults, trace = [], folder / "trace"
    for command in commands:
        line = [*without, sys.executable, "-m", "ddfup", *command]
        if shutil.which("strace") and counts.starts >= 10:
            kinds = "trace=connect,sendto,sendmsg,bind"
            line = [*without, "strace", "-f", "--seccomp-bpf", "-e", kinds, "-o", str(trace), *line[len(without) :]]
        done = subprocess.run(line, cwd=home, env=settings, capture_output=True, text=True, timeout=300)
        if done.returncode:
            faults.append(f"{' '.join(command)}: {done.stderr[-300:]}")
        if trace.exists():
            faults += [f"{command[0]}: {entry}" for entry in trace.read_text().splitlines() if "AF_INET" in entry]
    if log.exists():
        faults += log.read_text().splitlines()
    # The watch sees at all.
    code = "import socket; s = socket.socket(); s.settimeout(0.1); s.connect_ex(('127.0.0.1', 9))"
    subprocess.run([sys.executable, "-c", code], env=settings, check=True)
    if not log.exists():
        faults.append("the watch is blind")
    ways = ["audit hook", *(["no network namespace"] if without else []), *(["strace"] if trace.exists() else [])]
    yield Line(
        "P16",
        f"{len(commands)} commands under {', '.join(ways)}",
        f"{len(faults)} connections or failures",
        not faults,
        faults,
    )


def _without_network():
    """Return what starts a process that has no network at all, where we may."""
    line = ["unshare", "-n"]
    with contextlib.suppress(OSError):
        if subprocess.run([*line, "true"], capture_output=True).returncode == 0:
            return line
    return []


def p17(counts, folder):
    """Fast start."""
    del folder
    times, work = [], []
    for _ in range(counts.starts):
        before, begin = os.times(), time.perf_counter()
        subprocess.run([sys.executable, "-m", "ddfup", "--help"], env=environment(), check=True, capture_output=True)
        times.append(time.perf_counter() - begin)
        after = os.times()
        work.append(after.children_user + after.children_system - before.children_user - before.children_system)
    median, busy = statistics.median(times), statistics.median(work)
    figure = f"median {median:.2f} s ({busy:.2f} s of CPU)"
    # In the suite, where others are at work, only the work itself counts.
    fine = (median if counts.starts >= 10 else busy) <= 0.3
    yield Line("P17", f"{counts.starts} x ddfup --help", figure, fine)
