"""`ddfup batch`: folders, globs and lists of pairs."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Protocol

import typer

from ddfup.commands.batch_pairs import find_pairs, parse_shard, tell
from ddfup.errors import ArgumentError, DDFUpError
from ddfup.options import (
    ConfigOption,
    DebugOption,
    DeviceOption,
    DryRunOption,
    FillOption,
    FormatOption,
    InvalidOption,
    JsonOption,
    MaxPixelsOption,
    MinConfidenceOption,
    ModelOption,
    OverwriteOption,
    PrecisionOption,
    QuietOption,
    RawOption,
    SkipOption,
    TileOption,
    UnitOption,
    VerboseOption,
    one_of,
    refuse_alone,
)
from ddfup.signals import handled
from ddfup.terminal import Terminal, data_only, print_json

if TYPE_CHECKING:
    from ddfup.batch.pairing import Pair
    from ddfup.batch.processing import Outcome
    from ddfup.batch.remote import Location
    from ddfup.commands.batch_report import ReportFiles


class Engine(Protocol):
    """What does a batch."""

    loading: bool

    def check(self, among: Sequence[Pair]) -> None:
        """Refuse, before any work, what must not be."""

    def results(self) -> Generator[Outcome, None, None]:
        """Do the work; yield what became of each pair."""

    def stop(self) -> None:
        """End after what is under way, which is finished."""

    def abandon(self) -> None:
        """Wait for nothing when the work ends, which the caller then ends at once."""


def batch(
    ctx: typer.Context,
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="DEPTHS GUIDES OUT_DIR",
            help="Folders (with all below them), quoted globs or URLs (s3://, gs://), and where results go; "
            "OUT_DIR alone with --manifest.",
            show_default=False,
        ),
    ],
    manifest: Annotated[
        Path | None,
        typer.Option(
            "--manifest",
            metavar="FILE",
            help="A .csv or .jsonl list with depth, guide, out (below OUT_DIR), confidence; paths relative to it.",
            show_default=False,
        ),
    ] = None,
    pair_by: Annotated[
        str | None,
        typer.Option(
            "--pair-by",
            metavar="stem|regex|time:TOL|manifest",
            help="What makes a pair: equal path without suffix (default), equal key, times at most TOL seconds apart.",
            show_default=False,
        ),
    ] = None,
    pair_regex: Annotated[
        str | None,
        typer.Option(
            "--pair-regex",
            metavar="REGEX",
            help="Finds the key in a path: its named groups, else its first one.",
            show_default=False,
        ),
    ] = None,
    confidence: Annotated[
        str | None,
        typer.Option(
            "--confidence",
            metavar="PLACE",
            help="Confidence maps of the depths (0, 1, 2; ARKit, Record3D): a folder, glob or URL, paired like guides.",
            show_default=False,
        ),
    ] = None,
    min_confidence: MinConfidenceOption = 1,
    raw: RawOption = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    tile: TileOption = "auto",
    unit: UnitOption = None,
    invalid: InvalidOption = "0,nan,inf",
    fill: FillOption = False,
    format: FormatOption = None,
    preview: Annotated[
        str | None,
        typer.Option("--preview", metavar="DIR", help="Also write pictures: guide, input, result.", show_default=False),
    ] = None,
    overwrite: OverwriteOption = False,
    skip_existing: SkipOption = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try damaged inputs again that have not changed.")
    ] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failure.")] = False,
    write_report: Annotated[
        bool,
        typer.Option("--report", help="Also write OUT_DIR/batch.html and batch.csv: what became of each pair."),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            max=4096,
            metavar="N",
            help="Pairs read and written at once; with Ray, worker processes. Default: what the machines have.",
            show_default=False,
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Do part I (from 0) of N. Default: by RANK and WORLD_SIZE, or the Slurm array.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option("--engine", help="Work on this machine, or on the Ray cluster of RAY_ADDRESS (else a local one)."),
    ] = "local",
    ray_wait: Annotated[
        float,
        typer.Option("--ray-wait", min=0, metavar="SECONDS", help="How long to wait for room on the Ray cluster."),
    ] = 120.0,
    dry_run: DryRunOption = False,
    max_pixels: MaxPixelsOption = 200_000_000,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
    config: ConfigOption = None,
) -> None:
    """Upsample many pairs; a second run does what is missing or changed.

    Two runs on one OUT_DIR share the work.
    """
    terminal = ctx.ensure_object(Terminal)
    overwrite, skip_existing = one_of(ctx, overwrite=overwrite, skip_existing=skip_existing)
    refuse_alone(ctx, "min_confidence", "--confidence", confidence or manifest)
    if len(places) != (3 if manifest is None else 1):
        wanted = "DEPTHS GUIDES OUT_DIR" if manifest is None else "OUT_DIR alone, with --manifest"
        raise ArgumentError(f"batch must have {wanted}; got {len(places)}: {' '.join(places)}", "quote globs")
    part = parse_shard(shard, terminal)
    from ddfup import io, pair
    from ddfup.batch.engine import Batch, select_shard
    from ddfup.batch.processing import Settings
    from ddfup.batch.remote import parse_location
    from ddfup.models import DEFAULT_MODEL, find_model

    options = pair.Options(
        unit=io.parse_unit(unit) if unit else None,
        invalid=io.parse_invalid(invalid),
        format=format,
        fill=fill,
        min_confidence=min_confidence,
        max_pixels=max_pixels,
        raw=io.parse_size(raw) if raw else None,
    )
    out_dir = parse_location(places[-1])
    with terminal.working("looking for pairs"):
        # The journal comes second: what another run adds to OUT_DIR meanwhile is in it, and is no input.
        found, journal = find_pairs(
            places, confidence, manifest, pair_by, pair_regex, format, out_dir, raw=raw is not None
        )
    tell(terminal, found, listed=manifest is not None)
    info = find_model(model or DEFAULT_MODEL)
    pairs = select_shard(found.pairs, *part)
    settings = Settings(
        out_dir=out_dir,
        options=options,
        weights_sha256=info.sha256,
        network=("fp32" if precision == "auto" else precision, tile),
        preview_dir=parse_location(preview) if preview else None,
        overwrite=overwrite,
        skip_existing=skip_existing,
        retry_failed=retry_failed,
        fail_fast=fail_fast,
        dry_run=dry_run,
        workers=workers,
    )

    side = int(tile) if tile.isdigit() else tile

    def load() -> Any:
        from ddfup.batch.pool import make_pool

        return make_pool(str(info.path), device, precision, side)

    work: Engine
    if engine == "ray":
        from ddfup.batch.ray_engine import Plan, RayBatch

        work = RayBatch(pairs, settings, journal, Plan(info.path, device, precision, side, ray_wait))
    if engine == "local" or dry_run:
        work = Batch(pairs, settings, journal, load)
    work.check(found.pairs)
    files = None
    if write_report and not dry_run:
        from ddfup.commands.batch_report import ReportFiles

        files = ReportFiles(out_dir, settings.preview_dir, part, overwrite=overwrite)
    # Ray prints news of its cluster on stdout.
    with data_only(terminal) if engine == "ray" else contextlib.nullcontext():
        counts = _run(terminal, work, pairs, info.name, files, as_json=as_json, dry_run=dry_run)
    if counts["failed"]:
        raise typer.Exit(3 if counts["ok"] or counts["skipped"] else 4)


def _run(
    terminal: Terminal,
    work: Engine,
    pairs: list[Pair],
    model: str,
    files: ReportFiles | None,
    *,
    as_json: bool,
    dry_run: bool,
) -> dict[str, int]:
    """Do the work and tell of it; return how often each status came."""
    counts = dict.fromkeys(("ok", "skipped", "failed", "again"), 0)
    busy, begin, step = 0.0, time.monotonic(), 0
    with (
        _stopping(work) as caught,
        terminal.progress(len(pairs)) as show,
        contextlib.closing(work.results()) as results,
    ):
        for outcome in results:
            step += 1
            counts[outcome.status] += 1
            counts["again"] += outcome.again
            busy += outcome.busy
            _report(terminal, outcome, dry_run=dry_run)
            record = _record(outcome, model, dry_run)
            if as_json:
                print_json(record)
            if files is not None:
                files.add(record, outcome.pair.name)
            rate = counts["ok"] / max(time.monotonic() - begin, 1e-9)
            show(step, f"{rate:.2g} pairs/s" + (f", {counts['failed']} failed" if counts["failed"] else ""))
    seconds = time.monotonic() - begin
    left = len(pairs) - step
    parts = [
        f"{counts['ok']} {'to write' if dry_run else 'written'}",
        f"{counts['skipped']} already done",
        f"{counts['failed']} failed",
        *([f"{left} not reached"] if left else []),
    ]
    terminal.note(f"{', '.join(parts)}; {seconds:.1f} s" + _rate(counts["ok"], seconds, dry_run))
    if counts["ok"] and not dry_run:
        terminal.note(f"the network worked {busy / seconds:.0%} of the time", detail=True)
    if counts["again"]:
        terminal.note(f"{counts['again']} failed before and have not changed: --retry-failed tries them again")
    if files is not None:
        files.write(seconds)
        terminal.note(f"report: {files.page}")
    if caught and left:
        raise SystemExit(128 + caught[0])
    return counts


def _rate(count: int, seconds: float, dry_run: bool) -> str:
    return f", {count / seconds:.2g} pairs/s" if count and seconds > 0 and not dry_run else ""


@contextlib.contextmanager
def _stopping(work: Engine) -> Iterator[list[int]]:
    """Let the first SIGINT or SIGTERM end the work after the pair under way; a second one ends the process at once.

    What is inside is left before, so that the terminal is in order; a file under way stays under its temporary name,
    for a later batch to remove.

    Yields:
        The signals that came.
    """
    caught: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        if len(caught) > 1:
            work.abandon()
            raise SystemExit(128 + signum)
        work.stop()
        if work.loading:
            # Nothing is half done yet, and loading may take long.
            raise SystemExit(128 + signum)

    with handled(stop):
        try:
            yield caught
        except BaseException:
            if len(caught) > 1:  # whatever became of it on the way
                _leave(128 + caught[-1])
            raise


def _leave(code: int) -> NoReturn:
    """End the process as it is: a usual end would wait for the network, whose thread is an executor's."""
    try:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
                stream.flush()
    finally:
        os._exit(code)


def _report(terminal: Terminal, outcome: Outcome, *, dry_run: bool) -> None:
    """Tell of one pair: always of a failure, else as details."""
    work = outcome.pair
    if outcome.fatal:
        return  # told where it ends the batch
    if outcome.failure is not None:
        try:
            raise outcome.failure
        except DDFUpError as error:
            message, hint = error.message, error.hint
            named = any(str(path) in message for path in (*work.sources, outcome.out)) or work.problem
            text = message if named else f"{work.depth}: {message}"
            terminal.fail(text, hint if terminal.verbose else "")
        except Exception as error:
            terminal.fail(f"{work.depth}: internal error: {type(error).__name__}: {error}", "please report it")
    elif outcome.status == "skipped":
        terminal.note(f"skipped {outcome.out}: already done", detail=True)
    elif dry_run:
        size = f"{outcome.width}x{outcome.height} (x{outcome.factor:.4g})"
        terminal.note(f"would write {outcome.out}: {size} from {work.depth} and {work.guide}")
    else:
        terminal.note(f"wrote {outcome.out}: {outcome.seconds or 0:.2f} s", detail=True)
    for note in outcome.notes:
        terminal.note(f"note: {outcome.out}: {note}")


def _named(place: Location) -> str | None:
    return None if place == Path() else str(place)


def _record(outcome: Outcome, model: str, dry_run: bool) -> dict[str, Any]:
    failure = outcome.failure
    message = failure.message if isinstance(failure, DDFUpError) else f"{type(failure).__name__}: {failure}"
    record = {
        # A row of a manifest may lack them.
        "depth": _named(outcome.pair.depth),
        "guide": _named(outcome.pair.guide),
        "out": str(outcome.out) if outcome.pair.name else None,
        "status": outcome.status,
        "error": None if failure is None else message,
        "width": outcome.width,
        "height": outcome.height,
        "factor": outcome.factor,
        "model": model,
        "device": outcome.device,
        "kernels": outcome.kernels,
        "seconds": outcome.seconds,
        "valid_fraction": outcome.valid_fraction,
    }
    return record | ({"dry_run": True} if dry_run else {})
