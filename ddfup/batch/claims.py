"""Who is at work in an output folder, and what killed processes have left there.

Claims are byte ranges of one lock file in the folder's ``.ddfup``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from ddfup.batch.journal import NO_LINK, STATE_DIR
from ddfup.errors import OutputError

_MARKING = 1 << 61  # byte of the lock file that is locked while its mark is made


class Claims(Protocol):
    """Who works on what in an output folder.

    Attributes:
        works: Whether others see a claim; if not, every claim succeeds.
    """

    works: bool

    def take(self, name: str) -> bool:
        """Claim an output; False: another process has it."""

    def release(self, name: str) -> None:
        """Give a claim back."""

    def close(self) -> None:
        """Give all claims back."""


class NoClaims:
    """Claims where nothing can be locked: every one succeeds."""

    works = False

    def take(self, name: str) -> bool:
        """Claim an output, with success."""
        return True

    def release(self, name: str) -> None:
        """Give a claim back."""

    def close(self) -> None:
        """Give all claims back."""


class FolderClaims:
    """Who works on what in a folder, by locks that die with their process.

    They are byte ranges of one lock file: nothing is left over, whatever happens to the process. Byte 0 stands
    for being at work here at all, the byte at a hash of its name for one output. Where the system or the file
    system has no such locks, every claim succeeds, and `works` is false.

    Args:
        out_dir: The output folder, which exists.

    Raises:
        OutputError: If the lock file cannot be made.
    """

    def __init__(self, out_dir: Path) -> None:
        folder = out_dir / STATE_DIR
        self.works = True
        try:
            folder.mkdir(exist_ok=True)
            self._handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
        except OSError as error:
            raise OutputError(
                f"{folder}: must be writable; got {error.strerror or error}", "choose another output folder"
            ) from error
        self._lock(0, shared=True, wait=True)

    def identity(self) -> str:
        """Return what tells this folder from all others: a mark in the lock file, made when first asked for."""
        self._lock(_MARKING, wait=True)
        try:
            mark = os.pread(self._handle, 64, 0)
            if not mark:
                mark = secrets.token_hex(16).encode()
                os.pwrite(self._handle, mark, 0)
                os.fsync(self._handle)
            return mark.decode("ascii", "replace")
        except OSError as error:
            raise OutputError(f"the lock file must be writable; got {error.strerror or error}") from error
        finally:
            self._unlock(_MARKING)

    def take(self, name: str) -> bool:
        """Claim an output; False: another process has it."""
        return self._lock(_offset(name))

    def release(self, name: str) -> None:
        """Give a claim back."""
        self._unlock(_offset(name))

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Keep other processes from beginning; yields False if one is at work already."""
        alone = self.works and self._lock(0)
        try:
            yield alone
        finally:
            if alone:
                self._lock(0, shared=True, wait=True)

    def close(self) -> None:
        """Give all claims back."""
        os.close(self._handle)

    def _lock(self, offset: int, *, shared: bool = False, wait: bool = False) -> bool:
        if not self.works:
            return True
        try:
            import fcntl
        except ImportError:
            self.works = False
            return True
        try:
            how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
            fcntl.lockf(self._handle, how, 1, offset)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            self.works = False
        return True

    def _unlock(self, offset: int) -> None:
        if self.works:
            import fcntl

            fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, offset)


def _offset(name: str) -> int:
    # 60 bits: two of a million names meet with a chance of 1 in 2 million, and then only wait for each other.
    return 1 + int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") % (1 << 60)


def remove_leftovers(folders: Iterable[Path], *, age: float) -> int:
    """Remove temporary files that killed processes left.

    Args:
        folders: Where to look; only in these, not below.
        age: Seconds for which a file must not have changed: a younger one may be somebody's at work.

    Returns:
        Number of files removed.
    """
    count = 0
    for folder in folders:
        try:
            found = list(folder.glob(".ddfup-*.tmp"))
        except OSError:
            continue  # closed to us, or no name that the system takes
        for path in found:
            with contextlib.suppress(OSError):
                old = time.time() - path.lstat().st_mtime >= age
                if old and re.fullmatch(r"\.ddfup-[0-9a-f]{16}\.tmp", path.name):
                    path.unlink()
                    count += 1
    return count
