"""Which prediction belongs to which ground truth: files of the same relative stem."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ddfup.errors import InputError, PairingError
from ddfup.io import FORMATS

_DEPTH_SUFFIXES = frozenset(suffix for row in FORMATS.values() for suffix in row.suffixes)
_PICTURE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".exr", ".heic", ".heif"))


@dataclass(frozen=True)
class Sample:
    """One image of a report.

    Attributes:
        name: Relative stem, with ``/`` between folders.
        prediction: Depth file to judge.
        truth: Depth file to judge it by.
        guide: Picture of the view, if there is one.
        low: Low-resolution depth that the prediction was made from, if known.
        mask: Image whose pixels other than 0 count, if any.
    """

    name: str
    prediction: Path
    truth: Path
    guide: Path | None = None
    low: Path | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
        samples: The pairs, by name.
        notes: What was left out, one sentence each.
    """

    samples: list[Sample]
    notes: list[str] = field(default_factory=list)


def find_samples(
    prediction: Path,
    truth: Path,
    *,
    guides: Path | None = None,
    inputs: Path | None = None,
    masks: Path | None = None,
    leave_out: Path | None = None,
) -> Found:
    """Pair two files, or the files of two folders by their paths without suffix.

    Args:
        prediction: Depth file, or folder of such (searched with all its folders).
        truth: The same for ground truth.
        guides: Folder of pictures with the same stems; for two files the picture itself will do.
        inputs: The same for low-resolution depth.
        masks: The same for masks. Every pair must have one.
        leave_out: Folder that is not searched: where the report goes.

    Raises:
        InputError: If something is missing or cannot be listed.
        PairingError: If nothing pairs, or names are not unique.
    """
    for path in (prediction, truth, guides, inputs, masks):
        if path is not None and not path.exists():
            raise InputError(f"{path}: must exist; it does not")
    if prediction.is_dir() != truth.is_dir():
        raise PairingError(
            f"predictions and truth must be two files or two folders; got {prediction} and {truth}",
            "example: ddfup report results/ ground-truth/",
        )
    notes = []
    if prediction.is_dir():
        ours = _by_stem(prediction, _DEPTH_SUFFIXES, leave_out)
        theirs = _by_stem(truth, _DEPTH_SUFFIXES, leave_out)
        names = sorted(ours.keys() & theirs.keys())
        if not names:
            raise PairingError(
                f"no depth file in {prediction} ({len(ours)} files) has the relative stem of one in {truth} "
                f"({len(theirs)} files)",
                "results/a/x.png belongs to ground-truth/a/x.npy",
            )
        for folder, alone in ((prediction, ours.keys() - theirs.keys()), (truth, theirs.keys() - ours.keys())):
            if alone:
                some = ", ".join(sorted(alone)[:3]) + (", ..." if len(alone) > 3 else "")
                notes.append(f"{len(alone)} of {folder} without partner left out: {some}")
    else:
        names = [prediction.stem]
        ours, theirs = {names[0]: prediction}, {names[0]: truth}
    extras = {}
    for kind, place, suffixes in (
        ("guide", guides, _PICTURE_SUFFIXES),
        ("low", inputs, _DEPTH_SUFFIXES),
        ("mask", masks, _DEPTH_SUFFIXES),
    ):
        extras[kind] = _extras(place, names, truth, suffixes, leave_out)
        missing = [name for name in names if name not in extras[kind]]
        if place is not None and missing:
            what = {"low": "input"}.get(kind, kind)
            if kind == "mask":
                raise PairingError(f"{place}: must hold a mask for each pair; none for {missing[0]}")
            notes.append(f"{len(missing)} of {len(names)} without {what} in {place}")
    samples = [
        Sample(name, ours[name], theirs[name], *(extras[kind].get(name) for kind in ("guide", "low", "mask")))
        for name in names
    ]
    return Found(samples, notes)


def _extras(
    place: Path | None, names: list[str], truth: Path, suffixes: frozenset[str], leave_out: Path | None
) -> dict[str, Path]:
    """Return the files of a folder for the names; a single file goes to a single name."""
    if place is None:
        return {}
    if not place.is_dir():
        if len(names) > 1:
            raise PairingError(f"{place}: must be a folder for {len(names)} pairs; it is a file")
        return {names[0]: place}
    files = _by_stem(place, suffixes, leave_out)
    if len(names) == 1 and names[0] not in files and truth.stem in files:
        return {names[0]: files[truth.stem]}
    return {name: files[name] for name in names if name in files}


def _by_stem(folder: Path, suffixes: frozenset[str], leave_out: Path | None) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in _walk(folder, leave_out):
        if path.suffix.lower() not in suffixes:
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise PairingError(
                f"relative stems must be unique; got {found[name]} and {path}", "remove or rename one of them"
            )
        found[name] = path
    return found


def _walk(folder: Path, leave_out: Path | None) -> Iterator[Path]:
    """Yield all files in and below a folder, but for hidden ones."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: must be a readable folder; got {error.strerror}") from error

    hidden = leave_out.resolve() if leave_out is not None else None
    for place, folders, files in os.walk(folder, onerror=refuse):
        here = Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and (here / name).resolve() != hidden)
        yield from (here / name for name in sorted(files) if not name.startswith("."))
