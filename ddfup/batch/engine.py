"""A batch at work: threads read, take turns at the network, and write; what is done already is left alone.

A pair is one thread's from start to end, and there are as many pairs in memory as threads. While the network
has one of them, the others are decoded before it and encoded behind it.
"""

from __future__ import annotations

import collections
import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence

from ddfup.batch.claims import Claims
from ddfup.batch.journal import Journal
from ddfup.batch.outputs import open_outputs
from ddfup.batch.pairing import Pair
from ddfup.batch.pool import Pool, Stopped
from ddfup.batch.processing import Outcome, Processor, Settings
from ddfup.errors import DDFUpError

# Seconds after which a pair that another process has is looked at again.
PATIENCE = 0.3
# Pairs in memory for each network: one with it, one before it, one behind it.
PAIRS_PER_NETWORK = 3


class Batch:
    """Pairs to be done, and how.

    Args:
        pairs: The pairs; no two have the same output.
        settings: What to do.
        journal: The journal of the output folder.
        load: Loads the network. It is called once, in the thread that runs `results`, when a pair needs it.

    Attributes:
        loading: Whether the network is being loaded.
    """

    def __init__(self, pairs: Sequence[Pair], settings: Settings, journal: Journal, load: Callable[[], Pool]) -> None:
        self._pairs = pairs
        self._settings = settings
        self._journal = journal
        self._outputs = open_outputs(settings.out_dir, settings.preview_dir, journal, overwrite=settings.overwrite)
        self._load = load
        self._pool: Pool | None = None
        self._claims: Claims | None = None
        self._todo: collections.deque[tuple[float, Pair]] = collections.deque((0.0, pair) for pair in pairs)
        self._inbox: queue.SimpleQueue[Outcome | DDFUpError | str] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._ready = threading.Event()
        self._wanted = threading.Lock()
        # Nothing more is begun; nothing more is written, either.
        self._stop = threading.Event()
        self._drop = threading.Event()
        self._abandoned = False
        self.loading = False

    def check(self, among: Sequence[Pair]) -> None:
        """Refuse, before any work, outputs that would replace what they must not.

        Args:
            among: All pairs there are, of which these may be a part.

        Raises:
            OutputError: If an output is an input of any pair, or, unasked, a file that no batch has made.
        """
        self._outputs.check_all(self._pairs, among=among, keep=self._settings.skip_existing)

    def results(self) -> Generator[Outcome, None, None]:
        """Do the work.

        Yields:
            What became of each pair, in the order in which they end; after `stop`, those that were under way.

        Raises:
            DDFUpError: If nothing more can be done: the network cannot be loaded, or the disk is full.
        """
        settings = self._settings
        if not settings.dry_run:
            self._claims = self._outputs.open(self._pairs)
        processor = Processor(settings, self._outputs, self._journal, self._claims, self, self._drop.is_set)
        self._start(processor, settings.workers or _default_threads())
        ended = 0
        fatal: DDFUpError | None = None
        try:
            while ended < len(self._threads):
                message = self._inbox.get()
                if isinstance(message, Outcome):
                    yield message
                    if settings.fail_fast and message.status == "failed":
                        self._halt(drop=True)
                elif isinstance(message, DDFUpError):
                    fatal = fatal or message
                    self._halt(drop=True)
                elif message == "load":
                    self._load_pool()
                    if settings.workers is None and self._pool is not None:
                        # Several networks (one on each GPU) want more pairs at once than one does.
                        self._start(processor, PAIRS_PER_NETWORK * self._pool.size)
                elif message == "stop":
                    self._halt(drop=False)
                else:
                    ended += 1
            if fatal is not None:
                raise fatal
        finally:
            self._halt(drop=True)
            if not self._abandoned:
                for thread in self._threads:
                    thread.join()
                if self._pool is not None:
                    self._pool.close()
                if self._claims is not None:
                    self._outputs.close(self._pairs, self._claims)

    def stop(self) -> None:
        """End after what the network and the disk are at, which is finished; may be called by a signal handler."""
        self._inbox.put("stop")

    def abandon(self) -> None:
        """Wait for nothing when `results` ends; for a signal handler that raises, in a process that then ends."""
        self._abandoned = True
        if self._pool is not None:
            self._pool.abandon()

    # --- the network, as the processor asks for it ---

    def want(self) -> None:
        """Have the network loaded, if nobody has yet."""
        if self._wanted.acquire(blocking=False):
            self._inbox.put("load")

    def get(self) -> Pool:
        """Wait for the network.

        Raises:
            Stopped: If the batch ends first.
        """
        self._ready.wait()
        if self._stop.is_set() or self._pool is None:
            raise Stopped
        return self._pool

    def _load_pool(self) -> None:
        if self._stop.is_set():
            return
        self.loading = True
        try:
            self._pool = self._load()
        except DDFUpError as error:
            self._inbox.put(error)
        finally:
            self.loading = False
        self._ready.set()

    # --- the threads ---

    def _start(self, processor: Processor, count: int) -> None:
        """Have at least so many threads, but no more than pairs."""
        for _ in range(min(count, max(1, len(self._pairs))) - len(self._threads)):
            thread = threading.Thread(target=self._work, args=(processor,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _halt(self, *, drop: bool) -> None:
        if drop:
            self._drop.set()
        self._stop.set()
        self._ready.set()
        if self._pool is not None:
            self._pool.stop()

    def _work(self, processor: Processor) -> None:
        try:
            self._work_on(processor)
        finally:
            self._inbox.put("end")

    def _work_on(self, processor: Processor) -> None:
        while not self._stop.is_set():
            try:
                not_before, work = self._todo.popleft()
            except IndexError:
                break
            if self._stop.wait(max(0.0, not_before - time.monotonic())):
                break
            try:
                outcome = processor.process(work)
            except Stopped:
                break
            if outcome is None:
                self._todo.append((time.monotonic() + PATIENCE, work))
                continue
            if outcome.fatal or (outcome.failure is not None and self._settings.fail_fast):
                # At once, or this thread would take the next pair before the main one hears of it.
                self._drop.set()
                self._stop.set()
            self._inbox.put(outcome)
            if outcome.fatal and isinstance(outcome.failure, DDFUpError):
                self._inbox.put(outcome.failure)


def _default_threads() -> int:
    # More cores can hide slower disks.
    return max(PAIRS_PER_NETWORK, min(8, os.cpu_count() or 1))


def select_shard(pairs: Iterable[Pair], index: int, count: int) -> list[Pair]:
    """Return one of ``count`` parts of the pairs; which one a pair is in depends on its name only."""
    return [
        pair
        for pair in pairs
        if int.from_bytes(hashlib.sha256(os.fsencode(pair.name)).digest()[:8], "big") % count == index
    ]
