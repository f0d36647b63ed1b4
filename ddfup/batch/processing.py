"""What is done with one pair: left alone if it is done already, else read, upsampled, encoded, written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ddfup import __version__, io, pair, writing
from ddfup.batch.claims import Claims
from ddfup.batch.journal import NO_SPACE, Entry, Journal
from ddfup.batch.outputs import Outputs
from ddfup.batch.pairing import Pair
from ddfup.batch.pool import Answer, Pool, Stopped
from ddfup.batch.remote import Location, local_copies
from ddfup.errors import DDFUpError, InputError, OutputError

if TYPE_CHECKING:
    from ddfup.inference import Upsampler

# Fields of `pair.Options` that say where and whether to write, not what.
_NOT_IN_KEY = {"format", "preview", "overwrite", "skip_existing", "max_pixels", "confidence"}


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
        workers: Number of threads, or with Ray of processes; None: as many as make sense.
    """

    out_dir: Location
    options: pair.Options
    weights_sha256: str
    network: tuple[str, ...] = ()
    preview_dir: Location | None = None
    overwrite: bool = False
    skip_existing: bool = False
    retry_failed: bool = False
    fail_fast: bool = False
    dry_run: bool = False
    workers: int | None = None


@dataclass
class Outcome:
    """What became of one pair.

    Attributes:
        pair: The pair.
        out: Its output.
        status: As the command line reports it.
        failure: Why it failed.
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
        fatal: Whether the failure is one that every further pair would share, as a full disk is.
    """

    pair: Pair
    out: Location
    status: Literal["ok", "skipped", "failed"] = "failed"
    failure: Exception | None = None
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
    fatal: bool = False


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


class Network(Protocol):
    """Where the network comes from; it is loaded when the first pair needs it."""

    def want(self) -> None:
        """Say that it will be needed soon."""

    def get(self) -> Pool:
        """Return it, when it is loaded.

        Raises:
            Stopped: If the batch ends first.
            DDFUpError: If it cannot be loaded.
        """


class Processor:
    """Does pairs, in as many threads as call it.

    Args:
        settings: What to do.
        outputs: Where results go.
        journal: The journal of the output folder.
        claims: Who works on what; None: nobody is to know (a dry run).
        network: Where the network comes from.
        dropped: Tells whether what is under way is not to be written any more.
    """

    def __init__(
        self,
        settings: Settings,
        outputs: Outputs,
        journal: Journal,
        claims: Claims | None,
        network: Network,
        dropped: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._outputs = outputs
        self._journal = journal
        self._claims = claims
        self._network = network
        self._dropped = dropped

    def process(self, work: Pair) -> Outcome | None:
        """Do one pair.

        Returns:
            What became of it, failures included; None: another process has it just now.

        Raises:
            Stopped: If the batch ends before the pair has had its turn, or at once.
        """
        if self._claims is not None and not self._claims.take(work.name):
            return None
        outcome = Outcome(work, self._outputs.out(work))
        try:
            self._process(work, outcome)
        except Stopped:
            raise
        except DDFUpError as error:
            outcome.failure = error
            full = isinstance(error, OutputError) and getattr(error.__cause__, "errno", None) in NO_SPACE
            outcome.fatal = outcome.fatal or full
        except Exception as error:  # a fault of ours, or memory: one pair's, not the batch's
            outcome.failure = error
        finally:
            if self._claims is not None:
                self._claims.release(work.name)
        return outcome

    def _process(self, work: Pair, outcome: Outcome) -> None:
        settings = self._settings
        if work.problem is not None:
            raise work.problem
        if settings.skip_existing and outcome.out.is_file():
            outcome.status = "skipped"
            return
        row = io.format_of(Path(work.name))
        options = dataclasses.replace(settings.options, format=row.name if row else None, preview=None)
        # Set once only the content can be to blame.
        key = None
        try:
            with local_copies(*work.sources) as files:
                depth, guide = files[:2]
                options = dataclasses.replace(options, confidence=files[2] if len(files) > 2 else None)
                before = _state(*files)
                planned = pair.plan(depth, guide, "-", options)
                outcome.width, outcome.height, outcome.factor = planned.width, planned.height, planned.factor
                found = self._key([sha256_of(file) for file in files], planned.target.name)
                if self._is_done(work, found, outcome):
                    outcome.status = "skipped"
                    return
                known = self._journal.failure(work.name, found)
                if self._journal.made_otherwise(work.name, found):
                    raise OutputError(
                        f"{outcome.out}: must be made by one batch at a time; another one, with other options, model "
                        "or inputs, has made it since this one began",
                        "choose another OUT_DIR for one of them",
                    )
                if known is not None and not settings.retry_failed:
                    outcome.again = True
                    raise InputError(known.error or "failed before", known.hint)
                self._outputs.check(work)
                if settings.dry_run:
                    outcome.status = "ok"
                    return
                key = found
                self._make(work, outcome, planned, options, key, before)
        except _Changed:
            raise
        except InputError as error:
            # What the system refuses today it may allow tomorrow; a damaged file stays one.
            if key is not None and (not isinstance(error.__cause__, OSError) or error.__cause__.errno is None):
                self._journal.add(Entry(work.name, key, error=error.message, hint=error.hint))
            raise

    def _is_done(self, work: Pair, key: str, outcome: Outcome) -> bool:
        if self._claims is not None and self._claims.works:
            # What others have done meanwhile. In a dry run nobody shares, nor where nothing can be locked: there, on
            # a store, each look is a request.
            self._journal.refresh()
        entries = self._journal.made(work.name, key)
        if not entries or not outcome.out.is_file():
            return False
        digest = sha256_of(outcome.out)
        preview = self._outputs.preview(work)
        preview_digest = sha256_of(preview) if preview is not None and preview.is_file() else None
        for entry in entries:
            if entry.sha256 == digest and (preview is None or (preview_digest or "-") == entry.preview_sha256):
                outcome.valid_fraction = entry.valid_fraction
                return True
        return False

    def _make(
        self, work: Pair, outcome: Outcome, planned: pair.Plan, options: pair.Options, key: str, before: object
    ) -> None:
        self._network.want()
        inputs = pair.read(planned, options)
        sources = (planned.depth, planned.guide, *([options.confidence] if options.confidence else []))
        if _state(*sources) != before:
            raise _Changed(f"{work.depth}: depth and guide must not change while they are read", "run it again")
        try:
            turn = _Turn(self._network.get())
        except DDFUpError:
            outcome.fatal = True
            raise
        done = pair.run(dataclasses.replace(planned, out=None), inputs, cast("Upsampler", turn), options)
        if turn.answer is None:
            raise Stopped
        begin = time.perf_counter()
        outcome.busy = turn.answer.seconds
        files: dict[Location, bytes] = {outcome.out: done.data}
        entry = Entry(work.name, key, sha256=hashlib.sha256(done.data).hexdigest(), valid_fraction=done.valid_fraction)
        preview = self._outputs.preview(work)
        if preview is not None:
            from ddfup.preview import side_by_side

            label = inputs.unit.label or "disparity"
            picture = side_by_side(inputs.guide, inputs.depth.depth, turn.answer.depth, label=label)
            files[preview] = writing.encode_image(Path(preview.name), picture)
            entry = dataclasses.replace(
                entry,
                preview=self._outputs.relative(preview),
                preview_sha256=hashlib.sha256(files[preview]).hexdigest(),
            )
        if self._dropped():
            raise Stopped
        self._outputs.write(work, files, entry)
        outcome.device, outcome.kernels = turn.answer.device, turn.answer.kernels
        outcome.seconds = done.seconds - turn.waited + time.perf_counter() - begin
        outcome.valid_fraction, outcome.notes = done.valid_fraction, done.notes
        outcome.status = "ok"

    def _key(self, sources: list[str], target: str) -> str:
        options = self._settings.options
        parts = {
            "version": __version__,
            **dict(zip(("depth", "guide", "confidence"), sources, strict=False)),
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


def sha256_of(place: Location) -> str:
    """Return the hash of a file's content.

    Raises:
        InputError: If it cannot be read.
    """
    if not isinstance(place, Path):
        return hashlib.sha256(place.read_bytes()).hexdigest()
    try:
        with place.open("rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise InputError(f"{place}: must be readable; got {error.strerror or error}", "check the path") from error


def _state(*paths: Path) -> list[tuple[int, ...] | None]:
    """Return what changes when an input is written to."""
    states: list[tuple[int, ...] | None] = []
    for path in paths:
        try:
            status = path.stat()
            states.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        except (OSError, ValueError):
            states.append(None)
    return states
