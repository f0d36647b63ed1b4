"""Stderr, which is one for all threads: who speaks there waits until a C library that is kept off it has ended."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

# Held while file descriptor 2 leads elsewhere, and by whoever has something to say: it would be lost.
SPEAKING = threading.RLock()


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Keep a C library's own lines off stderr: what it says there it raises as well, and we say it once."""
    with SPEAKING, ExitStack() as stack:
        with suppress(OSError):  # stderr may be closed
            kept = os.dup(2)
            stack.callback(os.close, kept)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.close, nowhere)
            os.dup2(nowhere, 2)
            stack.callback(os.dup2, kept, 2)
        yield
