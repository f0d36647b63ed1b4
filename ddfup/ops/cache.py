"""Where built libraries are kept: folders to look in, the one to build in, and what in it may go."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# A build's folder as old as this is that of a process that was killed.
_STALE_SECONDS = 24 * 3600
# After this time without use a library is taken for one of a version, or a processor, that is no more.
_UNUSED_SECONDS = 90 * 24 * 3600
_OURS = re.compile(r"ddf_(cpu|cuda)-[0-9a-f]{32}\.(so|dll|lock)")


def cache_dir() -> Path:
    """Return the folder that libraries are built into, created if need be.

    It is the first that can be written of: DDFUP_CACHE_DIR, if that is set; the user's cache; a folder of this user
    under the system's temporary one; a temporary folder of this process.
    """
    return list(library_folders())[-1]


def library_folders() -> Iterator[Path]:
    """Yield the folders that libraries are looked for in, up to the first where one could be built.

    One that can only be read may well hold libraries, of the maker of a container image or of another node.
    """
    chosen = os.environ.get("DDFUP_CACHE_DIR")
    if chosen:
        named = Path(chosen).expanduser().absolute()
        yield named
        # Others may be meant to read it.
        if _is_writable(named, 0o777):
            return
    import platformdirs

    default = Path(platformdirs.user_cache_dir("ddfup", appauthor=False))
    # It is below the current folder, which may be anybody's, for a user without a home.
    if default.is_absolute():
        yield default
        if _is_writable(default, 0o700):
            return
    owner = os.getuid() if hasattr(os, "getuid") else "user"
    shared = Path(tempfile.gettempdir()) / f"ddfup-{owner}"
    if _is_writable(shared, 0o700) and _is_private(shared):
        yield shared
    else:
        yield _process_dir()


_private_folder: list[Path] = []


def _process_dir() -> Path:
    """Return a temporary folder that only this process uses."""
    if not _private_folder:
        _private_folder.append(Path(tempfile.mkdtemp(prefix="ddfup-")))
        atexit.register(_remove, _private_folder[0], os.getpid())
    return _private_folder[0]


def _remove(folder: Path, process: int) -> None:
    # A process forked since would take it from its parent.
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _is_writable(folder: Path, permissions: int) -> bool:
    """Tell whether files can be made in a folder, which is created with those permissions if need be."""
    try:
        folder.mkdir(mode=permissions, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _is_private(folder: Path) -> bool:
    """Tell whether nobody else could have put a library there for us to run."""
    if not hasattr(os, "getuid"):
        return True
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def is_readable(library: Path) -> bool:
    """Tell whether a library is there and may be read."""
    # In this order: it is an error to ask what a file is in a folder that may not be entered.
    return os.access(library, os.R_OK) and library.is_file()


def remove_stale(cache: Path) -> None:
    """Delete the folders of builds that were killed long ago."""
    for folder in cache.glob("build-*"):
        try:
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # another process was faster


def remove_unused(cache: Path, library: Path) -> None:
    """Delete the libraries, and locks, that have not been used for long, except the one just built."""
    for file in cache.glob("ddf_*"):
        try:
            found = file.stat()
            unused = time.time() - max(found.st_atime, found.st_mtime) > _UNUSED_SECONDS
            if unused and _OURS.fullmatch(file.name) and file.stem != library.stem:
                file.unlink()
        except OSError:
            continue  # another process was faster, or it is in use
