"""A batch at work: threads read, take turns at the network, and write; what is done already is left alone.

A pair is one thread's from start to end, and there are as many pairs in memory as threads. While the network
has one of them, the others are decoded before it and encoded behind it.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from ddfup import __version__, io, pair
from ddfup.batch.journal import NO_SPACE, Claims, Entry, Journal
from ddfup.batch.outputs import Outputs
from ddfup.batch.pairing import Pair
from ddfup.batch.pool import Answer, Pool, Stopped
from ddfup.errors import DDFUpError, InputError, OutputError

if TYPE_CHECKING:
    from ddfup.inference import Upsampler

# Seconds after which a pair that another process has is looked at again.
_PATIENCE = 0.3
# Fields of `pair.Options` that say where and whether to write, not what.
_NOT_IN_KEY = {"format", "preview", "overwrite", "skip_existing", "max_pixels"}


@dataclass(frozen=True)
class Settings:
    """What a batch is to do.

    Attributes:
        out_dir: Output folder.
        options: How to read and write; its preview, overwrite and skip_existing are not used.
        weights_sha256: Hash of the weight file.
        network: Further options that change what the network gives, such as its precision.
        preview_dir: Folder for previews, or None.
        overwrite: Whether files that are not from an earlier batch may be replaced.
        skip_existing: Whether any existing output is left as it is, unseen.
        retry_failed: Whether pairs that failed before, for their content, are tried again.
        fail_fast: Whether the first failure ends the batch.
        dry_run: Whether to find out only what there is to do.
        workers: Number of threads.
    """

    out_dir: Path
    options: pair.Options
    weights_sha256: str
    network: tuple[str, ...] = ()
    preview_dir: Path | None = None
    overwrite: bool = False
    skip_existing: bool = False
    retry_failed: bool = False
    fail_fast: bool = False
    dry_run: bool = False
    workers: int = 3


@dataclass
class Outcome:
    """What became of one pair.

    Attributes:
        pair: The pair.
        out: Its output.
        status: As the command line reports it.
        failure: Why it failed.
        fatal: Whether that ends the whole batch.
        again: Whether that is known from an earlier run.
        width: Columns of the output; None: not known.
        height: Its rows.
        factor: Output width over depth width.
        device: Where it was computed; None: not in this run.
        kernels: By which kernels.
        seconds: Time for reading, upsampling and writing, without waiting for a turn.
        busy: Time of that which the network took.
        valid_fraction: Share of output pixels that hold depth.
        notes: Things the user should know.
    """

    pair: Pair
    out: Path
    status: Literal["ok", "skipped", "failed"] = "failed"
    failure: Exception | None = None
    fatal: bool = False
    again: bool = False
    width: int | None = None
    height: int | None = None
    factor: float | None = None
    device: str | None = None
    kernels: str | None = None
    seconds: float | None = None
    busy: float = 0.0
    valid_fraction: float | None = None
    notes: list[str] = field(default_factory=list)


class _Changed(InputError):
    """An input was written to meanwhile: the next run is to look again."""


class _Turn:
    """One pair's turn at the network, in the shape of an `Upsampler`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.model_name = pool.model_name
        self.weights_sha256 = pool.weights_sha256
        self.answer: Answer | None = None
        self.waited = 0.0

    def __call__(self, depth: Any, guide: Any, *, valid: Any = None, fill: bool = False) -> NDArray[np.float32]:
        begin = time.perf_counter()
        self.answer = self._pool.infer(depth, guide, valid, fill)
        self.waited = time.perf_counter() - begin - self.answer.seconds
        return self.answer.depth


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
        self._outputs = Outputs(settings.out_dir, settings.preview_dir, journal, overwrite=settings.overwrite)
        self._load = load
        self._pool: Pool | None = None
        self._claims: Claims | None = None
        self._todo: collections.deque[tuple[float, Pair]] = collections.deque((0.0, pair) for pair in pairs)
        self._inbox: queue.SimpleQueue[Outcome | DDFUpError | str] = queue.SimpleQueue()
        self._ready = threading.Event()
        self._wanted = threading.Lock()
        self._stop = threading.Event()
        self.loading = False

    def check(self) -> None:
        """Refuse, before any work, outputs that would replace what they must not.

        Raises:
            OutputError: If an output is an input of any pair, or, unasked, a file that no batch has made.
        """
        self._outputs.check_all(self._pairs, keep=self._settings.skip_existing)

    def results(self) -> Generator[Outcome, None, None]:
        """Do the work.

        Yields:
            What became of each pair, in the order in which they end; after `stop`, those that ended.

        Raises:
            DDFUpError: If nothing more can be done: the network cannot be loaded, or the disk is full.
        """
        settings = self._settings
        if not settings.dry_run:
            self._claims = self._outputs.open(self._pairs)
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(settings.workers)]
        running = len(threads)
        for thread in threads:
            thread.start()
        fatal: DDFUpError | None = None
        try:
            while running:
                message = self._inbox.get()
                if isinstance(message, Outcome):
                    yield message
                    if settings.fail_fast and message.status == "failed":
                        self._halt()
                elif isinstance(message, DDFUpError):
                    fatal = fatal or message
                    self._halt()
                elif message == "load":
                    self._load_pool()
                elif message == "stop":
                    self._halt()
                else:
                    running -= 1
            if fatal is not None:
                raise fatal
        finally:
            self._halt()
            for thread in threads:
                thread.join()
            if self._pool is not None:
                self._pool.close()
            if self._claims is not None:
                self._outputs.sweep(self._pairs, self._claims)
                self._claims.close()

    def stop(self) -> None:
        """End after what is under way; may be called by a signal handler."""
        self._inbox.put("stop")

    def _halt(self) -> None:
        self._stop.set()
        self._ready.set()
        if self._pool is not None:
            self._pool.stop()

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

    # --- one pair ---

    def _work(self) -> None:
        try:
            self._work_on()
        finally:
            self._inbox.put("end")

    def _work_on(self) -> None:
        while not self._stop.is_set():
            try:
                not_before, work = self._todo.popleft()
            except IndexError:
                break
            if self._stop.wait(max(0.0, not_before - time.monotonic())):
                break
            claimed = self._claims is None or self._claims.take(work.name)
            if not claimed:
                self._todo.append((time.monotonic() + _PATIENCE, work))
                continue
            outcome = Outcome(work, self._outputs.out(work))
            fatal: DDFUpError | None = None
            try:
                self._process(work, outcome)
            except Stopped:
                break
            except DDFUpError as error:
                outcome.failure = error
                if isinstance(error, OutputError) and getattr(error.__cause__, "errno", None) in NO_SPACE:
                    fatal, outcome.fatal = error, True
            except Exception as error:  # a fault of ours, or memory: one pair's, not the batch's
                outcome.failure = error
            finally:
                if self._claims is not None:
                    self._claims.release(work.name)
            if fatal is not None or (outcome.failure is not None and self._settings.fail_fast):
                # At once, or this thread would take the next pair before the main one hears of it.
                self._stop.set()
            self._inbox.put(outcome)
            if fatal is not None:
                self._inbox.put(fatal)

    def _process(self, work: Pair, outcome: Outcome) -> None:
        settings = self._settings
        if work.problem is not None:
            raise work.problem
        if settings.skip_existing and outcome.out.is_file():
            outcome.status = "skipped"
            return
        row = io.format_of(outcome.out)
        options = dataclasses.replace(settings.options, format=row.name if row else None, preview=None)
        before = _state(work)
        planned = pair.plan(work.depth, work.guide, "-", options)
        outcome.width, outcome.height, outcome.factor = planned.width, planned.height, planned.factor
        key = self._key(_sha256(work.depth), _sha256(work.guide), planned.target.name)
        if self._is_done(work, key, outcome):
            outcome.status = "skipped"
            return
        known = self._journal.failure(work.name, key)
        if known is not None and not settings.retry_failed:
            outcome.again = True
            raise InputError(known.error or "failed before", known.hint)
        self._outputs.check(work)
        if settings.dry_run:
            outcome.status = "ok"
            return
        try:
            self._make(work, outcome, planned, options, key, before)
        except _Changed:
            raise
        except InputError as error:
            # What the system refuses today it may allow tomorrow; a damaged file stays one.
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno is None:
                self._journal.add(Entry(work.name, key, error=error.message, hint=error.hint))
            raise

    def _is_done(self, work: Pair, key: str, outcome: Outcome) -> bool:
        self._journal.refresh()
        entries = self._journal.made(work.name, key)
        if not entries or not outcome.out.is_file():
            return False
        digest = _sha256(outcome.out)
        preview = self._outputs.preview(work)
        preview_digest = _sha256(preview) if preview is not None and preview.is_file() else None
        for entry in entries:
            if entry.sha256 == digest and (preview is None or (preview_digest or "-") == entry.preview_sha256):
                outcome.valid_fraction = entry.valid_fraction
                return True
        return False

    def _make(
        self, work: Pair, outcome: Outcome, planned: pair.Plan, options: pair.Options, key: str, before: object
    ) -> None:
        self._want_pool()
        inputs = pair.read(planned, options)
        if _state(work) != before:
            raise _Changed(f"{work.depth}: depth and guide must not change while they are read", "run it again")
        self._ready.wait()
        if self._stop.is_set() or self._pool is None:
            raise Stopped
        turn = _Turn(self._pool)
        done = pair.run(dataclasses.replace(planned, out=None), inputs, cast("Upsampler", turn), options)
        if turn.answer is None:
            raise Stopped
        begin = time.perf_counter()
        outcome.busy = turn.answer.seconds
        files = {outcome.out: done.data}
        entry = Entry(work.name, key, sha256=hashlib.sha256(done.data).hexdigest(), valid_fraction=done.valid_fraction)
        preview = self._outputs.preview(work)
        if preview is not None:
            from ddfup.preview import side_by_side

            label = inputs.unit.label or "disparity"
            picture = side_by_side(inputs.guide, inputs.depth.depth, turn.answer.depth, label=label)
            files[preview] = io.encode_image(preview, picture)
            entry = dataclasses.replace(
                entry,
                preview=self._outputs.relative(preview),
                preview_sha256=hashlib.sha256(files[preview]).hexdigest(),
            )
        if self._stop.is_set():
            raise Stopped
        self._outputs.write(work, files, entry)
        outcome.device, outcome.kernels = turn.answer.device, turn.answer.kernels
        outcome.seconds = done.seconds - turn.waited + time.perf_counter() - begin
        outcome.valid_fraction, outcome.notes = done.valid_fraction, done.notes
        outcome.status = "ok"

    def _want_pool(self) -> None:
        if self._wanted.acquire(blocking=False):
            self._inbox.put("load")

    def _key(self, depth: str, guide: str, target: str) -> str:
        options = self._settings.options
        parts = {
            "version": __version__,
            "depth": depth,
            "guide": guide,
            "weights": self._settings.weights_sha256,
            "network": self._settings.network,
            "format": target,
            "options": {
                item.name: repr(getattr(options, item.name))
                for item in dataclasses.fields(options)
                if item.name not in _NOT_IN_KEY
            },
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def select_shard(pairs: Iterable[Pair], index: int, count: int) -> list[Pair]:
    """Return one of ``count`` parts of the pairs; which one a pair is in depends on its name only."""
    return [
        pair
        for pair in pairs
        if int.from_bytes(hashlib.sha256(os.fsencode(pair.name)).digest()[:8], "big") % count == index
    ]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise InputError(f"{path}: must be readable; got {error.strerror or error}", "check the path") from error


def _state(work: Pair) -> list[tuple[int, ...] | None]:
    """Return what changes when an input is written to."""
    states: list[tuple[int, ...] | None] = []
    for path in (work.depth, work.guide):
        try:
            status = path.stat()
            states.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        except (OSError, ValueError):
            states.append(None)
    return states
