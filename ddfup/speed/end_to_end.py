"""`ddfup upsample` as a person runs it: from the start of a new process to the file written."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ddfup import io, writing
from ddfup.errors import DeviceError
from ddfup.speed.memory import resident_peak
from ddfup.speed.pairs import make_pair
from ddfup.speed.results import Row
from ddfup.speed.timing import summarize

_POLL_SECONDS = 0.01


def bench(
    model: str,
    *,
    size: tuple[int, int],
    ratio: float,
    device: str,
    precision: str,
    threads: int,
    seconds: float,
    runs: int = 3,
) -> Iterator[Row]:
    """Time the command on a pair of files, a 16-bit PNG and a JPEG.

    Args:
        model: Name or path.
        size: (width, height) of the guide.
        ratio: Guide over depth.
        device: For ``--device``.
        precision: For ``--precision``.
        threads: CPU threads.
        seconds: Go on until the runs took so long.
        runs: Go on for at least so many, after one that warms the file cache.

    Yields:
        One row; its memory is that of the whole process, sampled until it ends.

    Raises:
        DeviceError: If the command fails.
    """
    with tempfile.TemporaryDirectory(prefix="ddfup-bench-") as folder:
        command = [*_write_pair(Path(folder), size, ratio), "--model", model]
        command += ["--device", device, "--precision", precision]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        _run(command, environment)
        begin = time.perf_counter()
        done: list[tuple[float, float, int | None]] = []
        while len(done) < runs or time.perf_counter() - begin < seconds:
            done.append(_run(command, environment))
    wall, cpu, peaks = zip(*done, strict=True)
    width, height = size
    yield Row(
        "end-to-end",
        f"{width}x{height}, ratio {ratio:g}, {precision}",
        Path(model).name,
        "forward",
        threads,
        summarize(list(wall), list(cpu)),
        peak=None if None in peaks else max(peaks),
        pixels=width * height,
    )


def _write_pair(folder: Path, size: tuple[int, int], ratio: float) -> list[str]:
    """Write a pair of files; return the command that upsamples it."""
    depth, guide = make_pair(size, ratio)
    paths = {name: folder / name for name in ("depth.png", "guide.jpg", "out.png")}
    data = io.encode_depth(
        depth, dtype=np.dtype(np.uint16), unit=io.parse_unit("mm"), target=io.FORMATS["png"], notes={}
    )
    picture = writing.encode_image(paths["guide.jpg"], guide)
    writing.write_files({paths["depth.png"]: data, paths["guide.jpg"]: picture})
    files = [str(paths[name]) for name in ("depth.png", "guide.jpg")]
    return [sys.executable, "-m", "ddfup", "upsample", *files, "-o", str(paths["out.png"]), "--overwrite"]


def _run(command: Sequence[str], environment: dict[str, str]) -> tuple[float, float, int | None]:
    """Run a command; return its seconds, CPU seconds and peak of memory."""
    start, used = time.perf_counter(), _cpu_of_children()
    # To a file: nobody reads a pipe while the process is watched.
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        peak: int | None = None
        try:
            while process.poll() is None:
                # The kernel keeps the peak, so that only what is new in the very last moment can be missed; what it
                # reports of ended children would include this process, which they were copied from.
                peak = resident_peak(process.pid) or peak
                time.sleep(_POLL_SECONDS)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
        if process.returncode:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
            first = said[0] if said else f"exit code {process.returncode}"
            raise DeviceError(f"ddfup upsample must succeed to be timed; it says: {first.removeprefix('error: ')}")
    return seconds, _cpu_of_children() - used, peak


def _cpu_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system
