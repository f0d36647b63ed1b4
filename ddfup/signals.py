"""What a long run does when it is asked to end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

# Those that ask a process to end: ctrl-C, and what `kill`, Docker and Slurm send.
REQUESTS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None], *, once: bool = False) -> Iterator[None]:
    """Let a function handle requests to end while the ``with`` block runs.

    Args:
        handler: Called with the signal's number and the frame that it came in.
        once: Whether only the first request is its; those after are for the handlers of before.
    """
    before = {number: signal.getsignal(number) for number in REQUESTS}

    def restore() -> None:
        for number, previous in before.items():
            if previous is not None:  # None: set by other means than Python's, and not to be had
                signal.signal(number, previous)

    def handle(signum: int, frame: FrameType | None) -> None:
        if once:
            restore()
        handler(signum, frame)

    try:
        for number in REQUESTS:
            signal.signal(number, handle)
        yield
    finally:
        restore()
