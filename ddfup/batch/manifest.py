"""Lists of pairs in a file: CSV or JSON lines with the columns depth, guide, out and confidence."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from ddfup import io
from ddfup.batch.journal import STATE_DIR
from ddfup.batch.pairing import Pair, Pairing, find_collisions, output_name
from ddfup.batch.remote import Location, RemotePath, parse_location
from ddfup.errors import ArgumentError, InputError, OutputError

_COLUMNS = ("depth", "guide", "out", "confidence")
# Of nearly every file system; leaves room for the suffix of a preview.
_LONGEST_NAME = 250


def read_manifest(path: Path, *, format_name: str | None = None) -> Pairing:
    """Read a list of pairs.

    Paths are relative to the manifest's folder, or URLs. ``out`` is a name below the output folder; where it is
    missing or empty, the depth's own name is taken. ``confidence`` may be missing or empty, too. A row that cannot be
    used becomes a pair with a problem: it fails alone.

    Args:
        path: ``.csv`` with a head line, or ``.jsonl`` with one object per line; UTF-8.
        format_name: Format of the outputs; None: by their suffix.

    Raises:
        ArgumentError: If the file is no such list.
    """
    kind = path.suffix.lower()
    if kind not in (".csv", ".jsonl"):
        raise ArgumentError(
            f"--manifest must be a .csv or .jsonl file; got {str(path)!r}",
            "its columns or keys are depth, guide and, if wanted, out and confidence",
        )
    result = Pairing()
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            for place, row in _csv_rows(path, stream) if kind == ".csv" else _json_rows(path, stream):
                result.pairs.append(_pair(place, row, path.parent, format_name))
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        if isinstance(error, ArgumentError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise ArgumentError(
            f"--manifest: {path} must be a readable UTF-8 list of pairs; got {reason}",
            "check the path, and how it was saved",
        ) from error
    result.conflicts = find_collisions(result.pairs)
    return result


def check_name(name: str) -> None:
    """Refuse an output name that is not plainly below the output folder.

    Raises:
        OutputError: If it is absolute, leads up, or is no name of a depth file.
    """
    path = PurePath(name)
    rule = ""
    if path.anchor or path.is_absolute():
        rule = "must be relative to the output folder"
    elif ".." in path.parts:
        rule = "must not contain '..'"
    elif not path.name or "\0" in name:
        rule = "must be a file name"
    elif any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
        rule = f"must have names of at most {_LONGEST_NAME} bytes"
    elif path.parts[0] == STATE_DIR:
        rule = f"must not lie in {STATE_DIR}, which belongs to the batch's journal"
    elif io.format_of(Path(name)) is None:
        known = ", ".join(suffix for row in io.FORMATS.values() for suffix in row.suffixes)
        rule = f"must end in one of {known}"
    if rule:
        raise OutputError(f"out {rule}; got {name!r}", "correct the manifest's column out")


def _csv_rows(path: Path, stream: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(stream, strict=True)
    columns = [str(name).strip().lower() for name in reader.fieldnames or []]
    if not {"depth", "guide"} <= set(columns):
        raise ArgumentError(
            f"--manifest: {path} must have columns depth and guide, and may have out; got {', '.join(columns)[:99]}",
            "separate the columns by commas" if len(columns) == 1 else "the first line of a CSV file names its columns",
        )
    reader.fieldnames = columns
    for row in reader:
        yield f"{path}:{reader.line_num}", row


def _json_rows(path: Path, stream: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield f"{path}:{number}", row if isinstance(row, dict) else {"": line[:80]}


def _pair(place: str, row: dict[str, Any], folder: Path, format_name: str | None) -> Pair:
    depth, guide, out, confidence = (row.get(column) for column in _COLUMNS)
    try:
        if not (isinstance(depth, str) and depth and isinstance(guide, str) and guide):
            raise InputError(f"{place}: must have depth and guide; got {_shown(row)}", "correct the manifest")
        if out is not None and not isinstance(out, str):
            raise OutputError(f"{place}: out must be a text; got {out!r:.80}", "correct the manifest")
        if confidence is not None and not isinstance(confidence, str):
            raise InputError(f"{place}: confidence must be a text; got {confidence!r:.80}", "correct the manifest")
        if None in row:
            raise InputError(f"{place}: must have as many fields as the head line; got {_shown(row)}", "quote commas")
        if not out:
            own = PurePath(depth)
            plain = not own.anchor and ".." not in own.parts and "://" not in depth
            out = output_name(own.as_posix() if plain else own.name, format_name)
        name = PurePath(out).as_posix()
        check_name(out)
        row_format = io.format_of(Path(name))
        if format_name is not None and row_format is not None and row_format.name != format_name:
            raise OutputError(
                f"{place}: --format {format_name} must agree with out; got {out!r}", "leave one of them out"
            )
        # What is in no path is found out here: then it is one row's problem and not that of every check to come.
        for text in (depth, guide, out, confidence or ""):
            os.fsencode(text)
            if "\0" in text:
                raise InputError(f"{place}: a path must not hold NUL; got {text!r:.80}", "correct the manifest")
        marks = _source(folder, confidence) if confidence else None
        return Pair(name, _source(folder, depth), _source(folder, guide), confidence=marks)
    except (InputError, OutputError, UnicodeEncodeError) as error:
        if isinstance(error, UnicodeEncodeError):
            error = InputError(f"{place}: must be paths; got {_shown(row)}", "correct the manifest")
        if not error.message.startswith(place):
            error = type(error)(f"{place}: {error.message}", error.hint)
        return Pair(str(out or ""), Path(str(depth or "")), Path(str(guide or "")), error)


def _source(folder: Path, text: str) -> Location:
    place = parse_location(text)
    return place if isinstance(place, RemotePath) else folder / place


def _shown(row: dict[Any, Any]) -> str:
    return repr({key: value for key, value in row.items() if value is not None})[:120]
