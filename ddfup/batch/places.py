"""What a folder, a glob, a file name or a URL on the command line stands for."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ddfup.batch.remote import Location, RemotePath, parse_location
from ddfup.errors import InputError

# By content a guide may be anything that `ddfup.io` reads; in a folder, these names are taken for pictures.
GUIDE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".exr", ".heic", ".heif"})
# What recorders call files without a header; others are named by a glob.
RAW_DEPTH_SUFFIXES = frozenset({".depth", ".raw", ".bin"})
RAW_CONFIDENCE_SUFFIXES = frozenset({".conf", ".raw", ".bin"})


@dataclass(frozen=True)
class Found:
    """A file and its name below the place that was asked for.

    Attributes:
        path: The file.
        name: Its path below the folder, or below the part of the glob without wildcards; ``/`` between parts.
    """

    path: Location
    name: str


@dataclass(frozen=True)
class Place:
    """The files of one place.

    Attributes:
        files: In the order of their names.
        ignored: Number of files that were left out for their suffix.
    """

    files: list[Found]
    ignored: int


def find_files(place: str, suffixes: Collection[str], *, what: str) -> Place:
    """List the files of a place.

    Hidden files and folders (names that begin with a dot) are left out. Links to folders are followed, but
    never in circles.

    Args:
        place: A folder, searched with all below it; else a file; else a glob (``**`` = any folders). The same
            behind a URL.
        suffixes: Lower-case suffixes that count in a folder; a glob or a file name takes everything.
        what: Name of the argument, for messages.

    Raises:
        InputError: If there is no such place, or a folder cannot be read.
    """
    path = parse_location(place)
    if isinstance(path, RemotePath):
        return _find_remote(path, suffixes, what)
    place = str(path)
    try:
        if path.is_dir():
            return _of_kinds(_walk(path), suffixes)
        if os.path.lexists(path):
            return Place([Found(path, path.name)], 0)
    except (OSError, ValueError) as error:
        raise InputError(f"{what}: {place!r} must be readable; got {error}", "check the path") from error
    if not glob.has_magic(place):
        raise InputError(f"{what} must be a folder, a file or a glob; there is no {place!r}", "check the path")
    return Place(sorted(_match(place), key=lambda found: found.name), 0)


def _of_kinds(found: Iterable[Found], suffixes: Collection[str]) -> Place:
    every = sorted(found, key=lambda found: found.name)
    files = [found for found in every if found.path.suffix.lower() in suffixes]
    return Place(files, len(every) - len(files))


def _find_remote(place: RemotePath, suffixes: Collection[str], what: str) -> Place:
    # On a store a folder is what has files below it, and a name may be both; a pattern is told by its marks.
    if not glob.has_magic(place.path):
        if place.is_file():
            return Place([Found(place, place.name)], 0)
        below = {name: path for name, path in place.find().items() if not _is_hidden(name)}
        if not below:
            raise InputError(f"{what} must have files in it; there are none in {str(place)!r}", "check the URL")
        return _of_kinds((Found(path, name) for name, path in below.items()), suffixes)
    parts = place.url.split("/")
    base = RemotePath("/".join(parts[: next(index for index, part in enumerate(parts) if glob.has_magic(part))]))
    named = ((path, path.relative_to(base)) for path in place.glob())
    return Place(sorted((Found(p, name) for p, name in named if not _is_hidden(name)), key=lambda f: f.name), 0)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _walk(folder: Path) -> Iterator[Found]:
    # Each entry: a folder, its name with "/" behind it, and the identities of the folders it lies in.
    waiting: list[tuple[Path, str, frozenset[tuple[int, int]]]] = [(folder, "", frozenset())]
    while waiting:
        here, prefix, above = waiting.pop()
        status = here.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            continue
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_dir(entry):
                    waiting.append((Path(entry.path), f"{prefix}{entry.name}/", above | {identity}))
                else:
                    yield Found(Path(entry.path), prefix + entry.name)


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link that leads nowhere: as a file it fails by itself, with a message of its own.
        return False


def _match(pattern: str) -> Iterator[Found]:
    parts = Path(pattern).parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:fixed])
    circular: dict[Path, bool] = {}
    # Not Path.glob, which takes hidden files, too, and treats ** differently from Python to Python.
    for match in set(glob.iglob(pattern, recursive=True)):  # noqa: PTH207
        path = Path(match)
        if path.is_dir():
            continue
        if path.parent not in circular:
            circular[path.parent] = _is_circular(path.parent, base)
        if not circular[path.parent]:
            yield Found(path, path.relative_to(base).as_posix())


def _is_circular(folder: Path, base: Path) -> bool:
    """Tell whether a folder below ``base`` is reached through itself."""
    chain = [folder, *folder.parents]
    chain = chain[: chain.index(base) + 1]
    return len({os.path.realpath(part) for part in chain}) < len(chain)
