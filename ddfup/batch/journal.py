"""What has been made in an output folder, from what, and who is at work there.

Both live in the folder's ``.ddfup``: an append-only journal for each host, and one lock file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddfup.errors import OutputError

STATE_DIR = ".ddfup"
# A disk that is full, over quota or read-only will be so for the next pair, too.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Entry:
    """One line of the journal.

    An output is done if its bytes have the hash of an entry for the same key; so the order of lines does not
    matter, nor does it matter whether the writer lived to see the file in its place.

    Attributes:
        out: Output below the output folder.
        key: Hash of all that the output depends on.
        sha256: Hash of the output; None: the pair failed.
        preview: Preview, relative to the output folder, if there is one.
        preview_sha256: Its hash.
        valid_fraction: Share of the output's pixels that hold depth.
        error: Why the pair failed.
        hint: What to do about it.
    """

    out: str
    key: str
    sha256: str | None = None
    preview: str | None = None
    preview_sha256: str | None = None
    valid_fraction: float | None = None
    error: str | None = None
    hint: str = ""


class Journal:
    """The journal of an output folder; safe for threads, and for processes on one or several hosts.

    Args:
        out_dir: The output folder; it need not exist.
    """

    def __init__(self, out_dir: Path) -> None:
        self._folder = out_dir / STATE_DIR
        # One file for each host: appending is atomic among the processes of one, not across a network.
        host = re.sub(r"[^A-Za-z0-9-]", "_", socket.gethostname())[:64] or "host"
        self._own = self._folder / f"journal.{host}.jsonl"
        self._read: dict[Path, int] = {}
        self._entries: dict[str, dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
        self._previews: set[str] = set()
        self._lock = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes have added.

        Raises:
            OutputError: If a journal cannot be read.
        """
        with self._lock:
            try:
                # A link could lead the journal out of the output folder.
                if self._folder.is_symlink():
                    raise OutputError(f"{self._folder}: must not be a link", "remove it")
                for path in self._folder.glob("journal.*.jsonl"):
                    self._refresh(path)
            except OSError as error:
                reason = error.strerror or str(error)
                raise OutputError(f"{self._folder}: must be readable; got {reason}", "see its rights") from error

    def _refresh(self, path: Path) -> None:
        begin = self._read.get(path, 0)
        if path.stat().st_size <= begin:
            return
        with path.open("rb") as stream:
            stream.seek(begin)
            data = stream.read()
        # The last line may be under way, or torn for ever; then the next writer begins a new one.
        whole = data.rfind(b"\n") + 1
        self._read[path] = begin + whole
        for line in data[:whole].splitlines():
            entry = _parse(line)
            if entry is not None:
                self._entries[entry.out][entry.key].append(entry)
                if entry.preview is not None:
                    self._previews.add(entry.preview)

    def knows(self, out: str) -> bool:
        """Tell whether an output, or what now stands in its place, was once made here."""
        with self._lock:
            return out in self._entries and self._made(out)

    def knows_preview(self, preview: str) -> bool:
        """Tell whether a preview, by its path relative to the output folder, was once made from here."""
        with self._lock:
            return preview in self._previews

    def files(self) -> set[str]:
        """Return all that was made here: outputs and previews, relative to the output folder."""
        with self._lock:
            return {out for out in self._entries if self._made(out)} | self._previews

    def _made(self, out: str) -> bool:
        return any(entry.sha256 for entries in self._entries[out].values() for entry in entries)

    def made(self, out: str, key: str) -> list[Entry]:
        """Return the entries that say how an output of this key looks."""
        with self._lock:
            return [entry for entry in self._entries.get(out, {}).get(key, []) if entry.sha256]

    def failure(self, out: str, key: str) -> Entry | None:
        """Return why this very work failed before, if it did."""
        with self._lock:
            return next((entry for entry in self._entries.get(out, {}).get(key, []) if not entry.sha256), None)

    def add(self, entry: Entry) -> None:
        """Append an entry and wait until it is on the disk.

        Raises:
            OutputError: If it cannot be written.
        """
        text = json.dumps({key: value for key, value in dataclasses.asdict(entry).items() if value not in (None, "")})
        # The leading line break ends a torn line that a killed writer may have left.
        data = f"\n{text}\n".encode()
        try:
            handle = os.open(self._own, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                written = os.write(handle, data)
                if written < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise OutputError(
                f"{self._own}: must be writable; got {error.strerror or error}", "free some space, or see its rights"
            ) from error


def _parse(line: bytes) -> Entry | None:
    try:
        values = json.loads(line)
        fields = {field.name for field in dataclasses.fields(Entry)}
        entry = Entry(**{key: value for key, value in values.items() if key in fields})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    texts: tuple[Any, ...] = (entry.out, entry.key, entry.hint)
    maybe = (entry.sha256, entry.preview, entry.preview_sha256, entry.error)
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(t, str | None) for t in maybe):
        return None
    return entry


class Claims:
    """Who works on what in an output folder, by locks that die with their process.

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
            self._handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OutputError(
                f"{folder}: must be writable; got {error.strerror or error}", "choose another output folder"
            ) from error
        self._lock(0, shared=True, wait=True)

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


def remove_leftovers(folders: Iterable[Path], *, age: float = 0.0) -> int:
    """Remove temporary files that killed processes left.

    Args:
        folders: Where to look; only in these, not below.
        age: Seconds for which a file must not have changed; 0: whatever its age.

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
                old = not age or time.time() - path.lstat().st_mtime >= age
                if old and re.fullmatch(r"\.ddfup-[0-9a-f]{16}\.tmp", path.name):
                    path.unlink()
                    count += 1
    return count
