"""Makes a report: measures all pairs, then writes page, pictures and data, all or nothing."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from ddfup import writing
from ddfup.errors import OutputError
from ddfup.metrics import describe
from ddfup.report.evaluation import Examined, Options, examine
from ddfup.report.page import Card, render_report
from ddfup.report.pairs import Sample
from ddfup.report.pictures import Pictures
from ddfup.report.results import Report, Row, encode_csv, encode_json

PICTURES = "report_images"
_FILES = ("report.html", "metrics.json", "metrics.csv")
_OURS = re.compile(r"[0-9]{5,}-(guide|input|result|truth|error)\.(jpg|png)")

# A page has to open on a phone and go through mail: all thumbnails together stay below this.
_THUMBNAILS_BYTES = 10_000_000
_KINDS = 5


def check_outputs(out: Path, names: Sequence[str] = (*_FILES, PICTURES), *, overwrite: bool) -> None:
    """Refuse, before any work, a folder that cannot take the outputs.

    Args:
        out: Folder; it need not exist.
        names: What will be written into it.
        overwrite: Whether what is there may be replaced.

    Raises:
        OutputError: If something is in the way.
    """
    if os.path.lexists(out) and not out.is_dir():
        raise OutputError(f"{out}: the output must be a folder; this is a file", "choose another place with -o")
    home = next(place for place in (out, *out.absolute().parents) if place.is_dir())
    if not os.access(home, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: must be a writable folder; {home} is not writable", "choose another place with -o")
    for path in (out / name for name in names):
        writing.refuse_existing(path, overwrite=overwrite)
        if not os.path.lexists(path):
            continue
        if path.name != PICTURES:
            writing.check_writable(path)
        elif path.is_symlink() or not path.is_dir() or not all(_OURS.fullmatch(each.name) for each in path.iterdir()):
            raise OutputError(f"{path}: must hold pictures of a report only; it does not", "choose another -o")


def write_report(
    samples: Sequence[Sample],
    out: Path,
    options: Options,
    *,
    prediction: str,
    truth: str,
    overwrite: bool = False,
    progress: Callable[[Row], None] | None = None,
) -> Report:
    """Measure pairs and write report.html, metrics.json, metrics.csv and the pictures' folder.

    Args:
        samples: The pairs.
        out: Folder; made if it does not exist.
        options: How to read and measure.
        prediction: What the report calls the predictions.
        truth: What it calls the ground truth.
        overwrite: Whether an older report may be replaced.
        progress: Called with each row, in the order of ``samples``.

    Returns:
        What was measured; nothing is written if all pairs failed.

    Raises:
        OutputError: If the outputs cannot be written; then nothing of them is left over.
    """
    check_outputs(out, overwrite=overwrite)
    rows: list[Row] = []
    cards: list[Card] = []
    with _folder(out) as temporary:
        for number, examined in enumerate(_examine_all(samples, options), start=1):
            rows.append(examined.row)
            if examined.pictures is not None:
                cards.append(_save(examined.row, examined.pictures, temporary, f"{number:05d}"))
            if progress is not None:
                progress(examined.row)
        report = Report(
            prediction, truth, options.thresholds.unit, _settings(samples, options), describe(options.thresholds), rows
        )
        if cards:
            files = {
                "report.html": render_report(report, cards),
                "metrics.json": encode_json(report),
                "metrics.csv": encode_csv(report),
            }
            with _replaced(out / PICTURES, temporary):
                writing.write_files({out / name: data for name, data in files.items()})
    return report


def _examine_all(samples: Sequence[Sample], options: Options) -> Iterator[Examined]:
    """Examine pairs on a few threads (decoders and OpenCV run beside Python); results come in order."""
    share = _THUMBNAILS_BYTES // (_KINDS * max(len(samples), 1))
    most = min(share, 40_000)
    side = 480 if len(samples) <= 60 else 240 if len(samples) <= 250 else 160

    def work(sample: Sample) -> Examined:
        return examine(sample, options, thumbnail_bytes=most, thumbnail_side=side)

    workers = min(4, os.cpu_count() or 1, max(len(samples), 1))
    with ThreadPoolExecutor(workers, thread_name_prefix="ddfup-report") as pool:
        # A window, so that pictures do not pile up while the disk is slow.
        waiting = [pool.submit(work, sample) for sample in samples[: 2 * workers]]
        try:
            for index in range(len(samples)):
                yield waiting.pop(0).result()
                if index + 2 * workers < len(samples):
                    waiting.append(pool.submit(work, samples[index + 2 * workers]))
        finally:
            pool.shutdown(cancel_futures=True)


def _save(row: Row, pictures: Pictures, folder: Path, number: str) -> Card:
    """Write the full pictures; keep the thumbnails."""
    links = {}
    for kind, shown in pictures.shown.items():
        file = folder / f"{number}-{kind}{shown.suffix}"
        try:
            file.write_bytes(shown.full)
        except OSError as error:
            raise OutputError(
                f"{file}: must be writable ({len(shown.full)} bytes); got {error.strerror or error}",
                "free some space, or choose another place with -o",
            ) from error
        links[kind] = f"{PICTURES}/{file.name}"
    # The page needs the thumbnails only; all full pictures together may not fit the memory.
    kept = {kind: replace(shown, full=b"") for kind, shown in pictures.shown.items()}
    return Card(row, replace(pictures, shown=kept), links)


def _settings(samples: Sequence[Sample], options: Options) -> dict[str, object]:
    return {
        "masks": any(sample.mask is not None for sample in samples),
        "unit": options.unit.name if options.unit else None,
        "truth_unit": options.truth_unit.name if options.truth_unit else None,
        "crop_border": options.crop_border,
        "max_depth": options.max_depth,
        "thresholds": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(options.thresholds).items()},
    }


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """Make the output's folder and a temporary one in it; leave nothing over of what is not needed."""
    temporary = out / f".ddfup-{secrets.token_hex(8)}.tmp"
    with writing.output_folder(out):
        try:
            temporary.mkdir()
        except OSError as error:
            raise OutputError(
                f"{out}: must be a writable folder; got {error.strerror or error}", "choose another place with -o"
            ) from error
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _replaced(target: Path, source: Path) -> Iterator[None]:
    """Put one folder in the place of another; back again if what follows fails."""
    old = source.with_name(f".ddfup-{secrets.token_hex(8)}.tmp")
    try:
        if os.path.lexists(target):
            target.rename(old)
        source.rename(target)
        yield
    except BaseException as error:
        if target.is_dir() and not source.exists():
            target.rename(source)
        if old.exists():
            old.rename(target)
        if isinstance(error, OSError):
            raise OutputError(f"{target}: must be writable; got {error.strerror or error}") from error
        raise
    shutil.rmtree(old, ignore_errors=True)
