"""What `ddfup batch` is to do: pairs found and named, choices that are not clear refused, the part of a shard."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ddfup.errors import ArgumentError, PairingError
from ddfup.terminal import Terminal

if TYPE_CHECKING:
    from ddfup.batch.journal import Journal
    from ddfup.batch.pairing import Pairing
    from ddfup.batch.remote import Location

# Lines about files without partner, and about what is not clear; the rest is counted, unless with -v.
_FEW = 5
_MANY = 20


def find_pairs(
    places: list[str],
    confidence: str | None,
    manifest: Path | None,
    pair_by: str | None,
    pair_regex: str | None,
    format_name: str | None,
    out_dir: Location,
    *,
    raw: bool,
) -> tuple[Pairing, Journal]:
    """Find the pairs of two places or of a manifest, and the journal of the output folder.

    Arguments as the options of the command; ``raw``: whether files without a header count, too.

    Raises:
        ArgumentError: If options contradict each other or cannot be read.
        PairingError: If there is no pair.
        InputError: If a place cannot be read.
    """
    from ddfup import io
    from ddfup.batch.journal import open_journal
    from ddfup.batch.manifest import read_manifest
    from ddfup.batch.pairing import add_confidence, pair_files, parse_rule
    from ddfup.batch.places import GUIDE_SUFFIXES, RAW_CONFIDENCE_SUFFIXES, RAW_DEPTH_SUFFIXES, find_files

    if manifest is not None:
        if pair_by not in (None, "manifest") or pair_regex is not None:
            raise ArgumentError(
                "--manifest must not come with another --pair-by or --pair-regex", "leave one of them out"
            )
        if confidence is not None:
            raise ArgumentError(
                f"--confidence must not come with --manifest; got {confidence}", "list the maps in a column confidence"
            )
        found = read_manifest(manifest, format_name=format_name)
        if not found.pairs:
            raise PairingError(
                f"--manifest: {manifest} must list a pair; it lists none",
                "one line each: depth, guide and, if wanted, out",
            )
        return found, open_journal(out_dir)
    if pair_by == "manifest":
        raise ArgumentError("--pair-by manifest must come with --manifest FILE", "example: --manifest pairs.csv")
    rule = parse_rule(pair_by or ("stem" if pair_regex is None else "regex"), pair_regex)
    suffixes = {suffix for row in io.FORMATS.values() for suffix in row.suffixes}
    depths = find_files(places[0], suffixes | (RAW_DEPTH_SUFFIXES if raw else set()), what="DEPTHS")
    guides = find_files(places[1], GUIDE_SUFFIXES, what="GUIDES")
    maps = None
    if confidence is not None:
        maps = find_files(confidence, suffixes | (RAW_CONFIDENCE_SUFFIXES if raw else set()), what="--confidence")
    journal = open_journal(out_dir)
    # Where OUT_DIR is an input folder, too, what was made there is no input.
    made = {_identity(out_dir / name) for name in journal.files()}
    depth_files, guide_files = (
        [file for file in place.files if _identity(file.path) not in made] if made else place.files
        for place in (depths, guides)
    )
    marks = [] if maps is None else maps.files
    if marks:
        # One folder may hold all three.
        own = {_identity(file.path) for file in marks}
        depth_files, guide_files = (
            [file for file in files if _identity(file.path) not in own] for files in (depth_files, guide_files)
        )
    found = pair_files(depth_files, guide_files, rule, format_name=format_name)
    if maps is not None:
        add_confidence(found, depth_files, marks, rule)
    for name, place in (("DEPTHS", depths), ("GUIDES", guides)):
        if place.ignored:
            found.orphans.append(f"{place.ignored} files in {name} are of other kinds")
    if not found.pairs and not found.conflicts:
        example = f"; for example {depth_files[0].name!r}" if depth_files else ""
        example += f" and {guide_files[0].name!r}" if depth_files and guide_files else ""
        raise PairingError(
            f"DEPTHS must have guides in GUIDES, by {rule}; {len(depth_files)} depth files and "
            f"{len(guide_files)} guides make no pair{example}",
            "--pair-by regex or time:TOL, or --manifest, may say what belongs together",
        )
    return found, journal


def _identity(place: Location) -> str:
    return os.path.realpath(place) if isinstance(place, Path) else str(place)


def tell(terminal: Terminal, found: Pairing, *, listed: bool) -> None:
    """Name what has no partner; refuse what is not clear."""
    for lines, most in ((found.orphans, _FEW), (found.conflicts, _MANY)):
        for index, line in enumerate(lines):
            terminal.note(f"note: {line}", detail=index >= most)
        if len(lines) > most and not terminal.verbose:
            terminal.note(f"note: {len(lines) - most} more like these; -v names them")
    if found.conflicts:
        remedy = "narrow the places by globs, or use --manifest"
        if listed:
            remedy = "give each row of the manifest an out of its own"
        raise PairingError(
            f"pairs must be clear before anything is done; {len(found.conflicts)} are not: {found.conflicts[0]}",
            remedy,
        )


def parse_shard(text: str | None, terminal: Terminal) -> tuple[int, int]:
    """Return the part (from 0) and the number of parts."""
    source = "--shard"
    if text is None:
        environment = os.environ
        if {"RANK", "WORLD_SIZE"} <= environment.keys():
            source, text = "RANK/WORLD_SIZE", f"{environment['RANK']}/{environment['WORLD_SIZE']}"
        elif {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"} <= environment.keys():
            source = "SLURM_ARRAY_TASK_ID/COUNT"
            text = _slurm_part()
        else:
            return 0, 1
    index, _, count = text.partition("/")
    if not (index.isascii() and index.isdigit() and count.isascii() and count.isdigit() and int(index) < int(count)):
        raise ArgumentError(
            f"{source} must be I/N with I from 0 to N - 1; got {text!r}", "example: --shard 0/4 is the first of four"
        )
    if source != "--shard" and int(count) > 1:
        terminal.note(f"note: part {text} by {source}")
    return int(index), int(count)


def _slurm_part() -> str:
    values = {name: os.environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("ID", "COUNT", "MIN", "STEP")}
    if not all(value.isascii() and value.isdigit() for value in values.values() if value):
        return f"{values['ID']}/{values['COUNT']}"
    index = (int(values["ID"]) - int(values["MIN"] or 0)) // max(1, int(values["STEP"] or 1))
    return f"{index}/{values['COUNT']}"
