"""Networks from numpy array to numpy array, each in a process of its own, so that its memory can be told."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ddfup import errors
from ddfup._memory import keep_freed_memory
from ddfup.inference import Upsampler
from ddfup.speed.memory import resident_peak
from ddfup.speed.pairs import make_pair
from ddfup.speed.results import Row
from ddfup.speed.timing import Timing, summarize, time_in_turns


@dataclasses.dataclass(frozen=True)
class Task:
    """What the child process does.

    Attributes:
        model: Name or path.
        size: (width, height) of the guide.
        ratio: Guide over depth.
        device: As for :class:`ddfup.inference.Upsampler`.
        precision: Likewise.
        tile: Likewise.
        threads: CPU threads, one measurement for each number.
        seconds: Per measurement; 0: one call, without warm-up.
    """

    model: str
    size: tuple[int, int]
    ratio: float
    device: str = "cpu"
    precision: str = "fp32"
    tile: str | int = "auto"
    threads: tuple[int, ...] = (1,)
    seconds: float = 1.0


def bench(task: Task) -> Iterator[Row]:
    """Time a network.

    Yields:
        One row per number of threads; the memory is that of the whole child process, PyTorch included.

    Raises:
        DDFUpError: What the child raises: unknown model, absent device, out of memory.
    """
    with tempfile.TemporaryDirectory(prefix="ddfup-bench-") as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "ddfup.speed.network", json.dumps(dataclasses.asdict(task)), str(answer)]
        # What is imported here is imported there.
        paths = os.pathsep.join(path for path in sys.path if path)
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
        if not answer.is_file():
            # Killed, as by the system when memory runs out.
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise errors.DeviceError(
                f"{task.model}: the process that is measured must not die; got {last[0]}",
                "a smaller --size needs less memory",
            )
        content = json.loads(answer.read_text("utf-8"))
    if "error" in content:
        raise getattr(errors, content["error"])(content["message"], content["hint"])
    width, height = task.size
    for threads, timing in zip(task.threads, content["timings"], strict=True):
        yield Row(
            "network",
            f"{width}x{height}, ratio {task.ratio:g}, {task.precision}",
            Path(task.model).name,
            "forward",
            threads,
            Timing(**timing),
            peak=content["peak"],
            pixels=width * height,
        )


def run(task: Task) -> dict[str, Any]:
    """Do the work of the child process.

    Returns:
        "timings": one per number of threads; "peak": bytes, or None.
    """
    depth, guide = make_pair(task.size, task.ratio)
    upsampler = Upsampler(task.model, device=task.device, precision=task.precision, tile=task.tile)
    device = torch.device(upsampler.device)
    timings = []
    for threads in task.threads:
        torch.set_num_threads(threads)
        timings.append(_time(lambda: upsampler(depth, guide), task.seconds, device))
    return {"timings": [dataclasses.asdict(timing) for timing in timings], "peak": resident_peak()}


def _time(call: Callable[[], object], seconds: float, device: torch.device) -> Timing:
    if seconds > 0:
        return time_in_turns({"": call}, seconds=seconds, device=device)[""]
    start, start_cpu = time.perf_counter(), time.process_time()
    call()
    return summarize([time.perf_counter() - start], [time.process_time() - start_cpu])


def _main(arguments: list[str]) -> None:
    content: dict[str, Any]
    # As the command line does.
    keep_freed_memory()
    try:
        values: dict[str, Any] = json.loads(arguments[0])
        values |= {"size": tuple(values["size"]), "threads": tuple(values["threads"])}
        content = run(Task(**values))
    except errors.DDFUpError as error:
        content = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    Path(arguments[1]).write_text(json.dumps(content), "utf-8")


if __name__ == "__main__":
    _main(sys.argv[1:])
