"""Settings of the whole process that several threads need for a while."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from types import TracebackType


class SharedContext:
    """A context that the first thread enters for all, and the last one leaves.

    Python's warning filters and PyTorch's precision are such settings: if every thread kept and restored them by
    itself, the first to leave would change them under the others, and the last could restore what another had set.

    Args:
        make: Makes the context.
    """

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._users = 0
        self._held = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._held.enter_context(self._make())
            self._users += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._held.close()
