"""Let the C library keep the memory of one layer of a network for the next."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# Blocks up to the first size, which the features of 100 megapixels have, come from the heap, and so much of it is kept
# when it becomes free: the most that mallopt takes. With an eighth and a quarter of it, the coarse levels of 100
# megapixels alone spent 12 s more on new pages.
_HEAP_BLOCK = 1 << 30
_KEPT = (2 << 30) - 1


def keep_freed_memory() -> bool:
    """Ask glibc not to return the memory of tensors to the system when they are freed.

    As it is, large blocks come from the system anew every time, which clears them page by page: up to a third of the
    time of a network on the CPU. The setting is the whole process's: for programs to make, not for libraries.

    Returns:
        Whether it was taken; not on other systems and C libraries.
    """
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _HEAP_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _KEPT))


def return_freed_memory() -> bool:
    """Give the system back what has been kept, for whoever wants to know how much the next call takes.

    Returns:
        Whether there was any; not on other systems and C libraries.
    """
    malloc_trim = _function("malloc_trim")
    return bool(malloc_trim and malloc_trim(0))


def _function(name: str) -> Callable[..., int] | None:
    """A function of glibc, or None where there is none of the name."""
    if sys.platform != "linux":
        return None
    import ctypes

    found: Any = getattr(ctypes.CDLL(None), name, None)
    return found  # type: ignore[no-any-return]
