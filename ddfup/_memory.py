"""Let the C library keep the memory of one layer of a network for the next."""

from __future__ import annotations

import sys

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# Blocks up to the first size come from the heap, and so much of it is kept when it becomes free. More would save
# little time, and cost memory by fragments.
_HEAP_BLOCK = 128 << 20
_KEPT = 512 << 20


def keep_freed_memory() -> bool:
    """Ask glibc not to return the memory of tensors to the system when they are freed.

    As it is, large blocks come from the system anew every time, which clears them page by page: up to two fifths of the
    time of a network on the CPU. The setting is the whole process's, so it is for programs to make, not for libraries.

    Returns:
        Whether it was taken; not on other systems and C libraries.
    """
    if sys.platform != "linux":
        return False
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _HEAP_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _KEPT))
