"""What a long run does when it is asked to end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

# Those that ask a process to end: ctrl-C, and what `kill`, Docker and Slurm send.
REQUESTS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[Callable[[], None]]:
    """Let a function handle requests to end, of which a process has but one at a time.

    Args:
        handler: Called with the signal's number and the frame that it came in.

    Yields:
        What puts the handlers of before in place again, as the end of the ``with`` block does.
    """
    before = {number: signal.signal(number, handler) for number in REQUESTS}

    def restore() -> None:
        for number, previous in before.items():
            signal.signal(number, previous)

    try:
        yield restore
    finally:
        restore()
