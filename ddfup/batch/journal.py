"""What has been made in an output folder, and from what.

This lives in the folder's ``.ddfup``, in an append-only file for each host. On an object store, which cannot append,
each entry is an object; a batch puts them together at its end.
"""

from __future__ import annotations

import abc
import dataclasses
import errno
import json
import os
import re
import secrets
import socket
import threading
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddfup.batch.remote import Location, RemotePath
from ddfup.errors import DDFUpError, OutputError

STATE_DIR = ".ddfup"
# State is not written through links, which would lead out of the output folder. Windows cannot refuse them.
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
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


class Journal(abc.ABC):
    """The journal of an output folder; safe for threads, and for processes on one or several hosts.

    `open_journal` makes the right kind for a place.
    """

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
        self._previews: set[str] = set()
        # What has come since this journal was opened: output -> keys.
        self._news: dict[str, set[str]] = defaultdict(set)
        self._opened = False
        self._lock = threading.Lock()
        self.refresh()
        self._opened = True

    @abc.abstractmethod
    def refresh(self) -> None:
        """Read what other processes have added.

        Raises:
            DDFUpError: If a journal cannot be read.
        """

    @abc.abstractmethod
    def add(self, entry: Entry) -> None:
        """Write an entry down, and return when it is safe.

        Raises:
            OutputError: If it cannot be written.
        """

    def _take(self, lines: bytes) -> None:
        for line in lines.splitlines():
            entry = _parse(line)
            if entry is not None:
                self._entries[entry.out][entry.key].append(entry)
                if entry.preview is not None:
                    self._previews.add(entry.preview)
                if self._opened and entry.sha256:
                    self._news[entry.out].add(entry.key)

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

    def made_otherwise(self, out: str, key: str) -> bool:
        """Tell whether an output has been made from something else than this key since this journal was opened."""
        with self._lock:
            return not self._news.get(out, set()) <= {key}

    def failure(self, out: str, key: str) -> Entry | None:
        """Return why this very work failed before, if it did and never succeeded."""
        with self._lock:
            entries = self._entries.get(out, {}).get(key, [])
            # What succeeded once is not damaged, whichever came first: of two hosts' lines nobody knows.
            return None if any(entry.sha256 for entry in entries) else next(iter(entries), None)


class FolderJournal(Journal):
    """The journal of a folder: one file for each host, to which its processes append.

    Args:
        out_dir: The output folder; it need not exist.
    """

    def __init__(self, out_dir: Path) -> None:
        self._folder = out_dir / STATE_DIR
        # One file for each host: appending is atomic among the processes of one, not across a network.
        host = re.sub(r"[^A-Za-z0-9-]", "_", socket.gethostname())[:64] or "host"
        self._own = self._folder / f"journal.{host}.jsonl"
        self._read: dict[Path, int] = {}
        super().__init__()

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
        self._take(data[:whole])

    def add(self, entry: Entry) -> None:
        """Append an entry and wait until it is on the disk.

        Raises:
            OutputError: If it cannot be written.
        """
        # The leading line break ends a torn line that a killed writer may have left.
        data = b"\n" + _line(entry)
        try:
            handle = os.open(self._own, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_LINK, 0o666)
            try:
                written = os.write(handle, data)
                if written < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise OutputError(
                f"{self._own}: must be writable, and no link; got {error.strerror or error}",
                "free some space, see its rights, or remove the link",
            ) from error


class StoreJournal(Journal):
    """The journal on an object store: one object for each entry, which `merge` puts together.

    Args:
        out_dir: The output folder.
    """

    def __init__(self, out_dir: RemotePath) -> None:
        self._folder = out_dir / STATE_DIR
        self._read: set[str] = set()
        super().__init__()

    def refresh(self) -> None:
        """Read what other processes have added.

        Raises:
            InputError: If a journal cannot be read.
        """
        with self._lock:
            # What another batch merges between listing and reading is found by listing again.
            for _ in range(3):
                if self._refresh():
                    break

    def add(self, entry: Entry) -> None:
        """Write an entry as an object of its own.

        Raises:
            OutputError: If it cannot be written.
        """
        (self._folder / f"journal.part-{secrets.token_hex(8)}.jsonl").write_bytes(_line(entry))

    def merge(self) -> None:
        """Make one object of those for single entries; killed at any moment, nothing is lost by it."""
        parts = [path for name, path in self._find() if name.startswith("journal.part-")]
        if len(parts) < 2:
            return
        whole = self._folder / f"journal.{secrets.token_hex(8)}.jsonl"
        # That another batch has merged the same ones meanwhile is no harm: it did not lose them either.
        found = [data for data in map(_content, parts) if data is not None]
        whole.write_bytes(b"".join(found))
        for path in parts:
            path.unlink()

    def _refresh(self) -> bool:
        complete = True
        for name, path in self._find():
            if name not in self._read:
                data = _content(path)
                complete &= data is not None
                self._read.add(name)
                self._take(data or b"")
        return complete

    def _find(self) -> list[tuple[str, RemotePath]]:
        names = sorted(self._folder.find().items())
        return [(name, path) for name, path in names if re.fullmatch(r"journal\.[^/]*\.jsonl", name)]


def open_journal(out_dir: Location) -> Journal:
    """Return the journal of an output folder.

    Raises:
        DDFUpError: If it cannot be read.
    """
    return StoreJournal(out_dir) if isinstance(out_dir, RemotePath) else FolderJournal(out_dir)


def _content(path: RemotePath) -> bytes | None:
    """Return what a part of the journal holds, or None if another batch has merged it meanwhile."""
    try:
        return path.read_bytes()
    except DDFUpError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def _line(entry: Entry) -> bytes:
    values = {key: value for key, value in dataclasses.asdict(entry).items() if value not in (None, "")}
    return json.dumps(values).encode() + b"\n"


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
