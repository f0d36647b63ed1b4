"""How much memory a piece of work needs; on the CPU Linux tells, elsewhere nobody does."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from ddfup._memory import return_freed_memory

# From here on glibc takes memory from the system and gives it back at once; smaller pieces it may have kept.
_SMALLEST_BYTES = 32 << 20


def resident_peak(process: int | str = "self") -> int | None:
    """Return the most memory a process has held, in bytes; None where the system cannot tell or it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def forget_peak() -> int | None:
    """Let `resident_peak` of this process begin anew; return what it holds now, in bytes, or None.

    Memory that the C library has kept goes back to the system first.
    """
    return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return resident_peak()


def peak_of(run: Callable[[], object], *, held: int, device: torch.device) -> int | None:
    """Measure the memory of one call: its inputs, its outputs and what it needs in between, as the paper counts it.

    Args:
        run: What to call.
        held: Bytes of the inputs, which are there before.
        device: Where it computes.

    Returns:
        Bytes; None where the system cannot tell, and for small work on the CPU, which is served from memory that
        the process kept.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return held + torch.cuda.max_memory_allocated(device) - before
    # Garbage that Python drops in the middle of the call would hide as much of what the call takes.
    gc.collect()
    if held < _SMALLEST_BYTES or (begin := forget_peak()) is None:
        return None
    run()
    end = resident_peak()
    return None if end is None else held + end - begin
