"""How a duration is measured: methods take turns, medians and quartiles are kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# Before the clock counts: code is loaded and memory is at hand.
_WARM_UP = 2
# What is read between two kernels that a GPU's own clock times: more than any second-level cache holds. Reading takes
# longer than it takes the CPU to ask for the next kernel, so that this does not count.
_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """Repeated durations of one piece of work, in seconds.

    Attributes:
        median: Of the wall time.
        low: First quartile.
        high: Third quartile.
        cpu: Median of the CPU time, summed over the threads of this process.
        rounds: Number of repetitions.
    """

    median: float
    low: float
    high: float
    cpu: float
    rounds: int


def summarize(wall: list[float], cpu: list[float]) -> Timing:
    """Make a timing of one or more repetitions.

    Args:
        wall: Seconds each took.
        cpu: CPU seconds each took.

    Example:
        >>> summarize([1.0, 2.0, 6.0], [1.0, 1.0, 1.0]).median
        2.0
    """
    low, _, high = statistics.quantiles(wall, n=4, method="inclusive") if len(wall) > 1 else wall * 3
    return Timing(statistics.median(wall), low, high, statistics.median(cpu), len(wall))


def time_in_turns(
    methods: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    device: torch.device,
    rounds: int = 5,
    kernels: bool = False,
) -> dict[str, Timing]:
    """Time several ways of doing the same work.

    In every round each method runs once, so that whatever disturbs the machine slows all of them alike and their
    ratios hold.

    Args:
        methods: Name -> what to run. On a GPU the clock waits for its work.
        seconds: Go on until the rounds took so long.
        device: Where the methods compute.
        rounds: Go on for at least so many rounds.
        kernels: On a GPU, take its own time for the work, from memory and not from its caches, without the call.

    Returns:
        Name -> timing.
    """
    for run in methods.values():
        for _ in range(_WARM_UP):
            run()
    wall: dict[str, list[float]] = {name: [] for name in methods}
    cpu: dict[str, list[float]] = {name: [] for name in methods}
    clock = _gpu_clock(device) if kernels and device.type == "cuda" else _wall_clock(device)
    begin = time.perf_counter()
    done = 0
    while done < rounds or time.perf_counter() - begin < seconds:
        for name, run in methods.items():
            start_cpu = time.process_time()
            wall[name].append(clock(run))
            cpu[name].append(time.process_time() - start_cpu)
        done += 1
    return {name: summarize(wall[name], cpu[name]) for name in methods}


def _wall_clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    def measure(run: Callable[[], object]) -> float:
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        return time.perf_counter() - start

    return measure


def _gpu_clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    stale = torch.zeros(_FLUSH_BYTES // 4, device=device)

    def measure(run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # Read rather than written: lines that the work would have to write back first are not its own.
        stale.sum()
        start.record()
        run()
        end.record()
        _wait(device)
        return float(start.elapsed_time(end)) / 1000

    return measure


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
