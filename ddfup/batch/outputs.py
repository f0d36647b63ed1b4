"""The files that a batch writes: where they go, what they may replace, and that no others are touched."""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ddfup import writing
from ddfup.batch.claims import Claims, FolderClaims, NoClaims, remove_leftovers
from ddfup.batch.journal import Entry, FolderJournal, Journal, StoreJournal
from ddfup.batch.pairing import Pair
from ddfup.batch.remote import Location, RemotePath, check_store
from ddfup.errors import ArgumentError, OutputError

# Seconds without change after which a temporary file is taken for a dead one.
_OLD = 60.0


class Outputs(abc.ABC):
    """The output folder and, if wanted, the folder of previews; `open_outputs` makes the right kind for a place.

    Args:
        out_dir: Output folder.
        preview_dir: Folder for previews, or None.
        journal: The journal of the output folder.
        overwrite: Whether files that are not from an earlier batch may be replaced.
    """

    def __init__(self, out_dir: Location, preview_dir: Location | None, journal: Journal, *, overwrite: bool) -> None:
        self._root = out_dir
        self._preview_root = preview_dir
        self._journal = journal
        self._overwrite = overwrite

    def out(self, work: Pair) -> Location:
        """Return where the depth goes."""
        return self._root / work.name

    def preview(self, work: Pair) -> Location | None:
        """Return where the preview goes, if there is to be one."""
        # The whole name of the output, so that two outputs never have one preview.
        return None if self._preview_root is None else self._preview_root / f"{work.name}.jpg"

    @abc.abstractmethod
    def relative(self, path: Location) -> str:
        """Return how the journal calls a preview."""

    @abc.abstractmethod
    def check_all(self, pairs: Sequence[Pair], *, among: Sequence[Pair], keep: bool) -> None:
        """Refuse, before any work, outputs that would replace what they must not.

        Args:
            pairs: The pairs to be done.
            among: All pairs, of which these may be a part: the inputs of others are not to be replaced either.
            keep: Whether outputs that exist are to stay, and so are in nobody's way.

        Raises:
            OutputError: If an output is an input of any pair, or, unasked, a file that no batch has made.
        """

    @abc.abstractmethod
    def check(self, work: Pair) -> None:
        """Refuse outputs of one pair that cannot or must not be written.

        Raises:
            OutputError: If one leads elsewhere by a link, is a folder, or would replace a file unasked.
        """

    @abc.abstractmethod
    def write(self, work: Pair, files: Mapping[Location, bytes], entry: Entry) -> None:
        """Write a pair's files as a whole, with their line in the journal.

        Raises:
            OutputError: If that fails; then older files are untouched.
        """

    @abc.abstractmethod
    def open(self, pairs: Sequence[Pair]) -> Claims:
        """Make the folders, tidy them, and register in the output folder as being at work.

        Raises:
            OutputError: If they cannot be made.
        """

    @abc.abstractmethod
    def join(self, mark: str) -> Claims:
        """Register as a worker of a batch that has opened the outputs.

        Args:
            mark: What `mark` gave there.

        Raises:
            OutputError: If this is another folder, as on another machine's own disk.
        """

    @abc.abstractmethod
    def mark(self, claims: Claims) -> str:
        """Return what tells this output folder from all others of its name."""

    @abc.abstractmethod
    def close(self, pairs: Sequence[Pair], claims: Claims) -> None:
        """Tidy up, and register as being gone."""

    def _files(self, work: Pair) -> list[Location]:
        preview = self.preview(work)
        return [self.out(work), *([] if preview is None else [preview])]

    def _may_replace(self, work: Pair, path: Location) -> bool:
        if self._overwrite:
            return True
        if path == self.preview(work):
            return self._journal.knows_preview(self.relative(path))
        return self._journal.knows(work.name)

    def _must_stay(self, work: Pair, path: Location) -> bool:
        """Tell whether a file that exists must not be replaced."""
        if self._may_replace(work, path):
            return False
        # Another batch may just have made it: its entry was there before the file.
        self._journal.refresh()
        return not self._may_replace(work, path)

    def _refuse_foreign(self, existing: Sequence[tuple[Pair, Location]], *, keep: bool) -> None:
        """Refuse files that are in the way, of those that exist."""
        # After looking: what another process has made meanwhile is in its journal.
        self._journal.refresh()
        foreign = [path for work, path in existing if not self._may_replace(work, path)]
        if foreign and not keep:
            more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
            raise OutputError(
                f"{foreign[0]}: must not exist yet unless from an earlier batch; it does{more}",
                "--overwrite replaces, --skip-existing keeps such files",
            )


class FolderOutputs(Outputs):
    """Outputs in a folder."""

    def __init__(self, out_dir: Path, preview_dir: Path | None, journal: Journal, *, overwrite: bool) -> None:
        super().__init__(out_dir, preview_dir, journal, overwrite=overwrite)
        self._out_dir = out_dir
        self._preview_dir = preview_dir

    def relative(self, path: Location) -> str:
        """Return how the journal calls a preview."""
        return Path(os.path.relpath(str(path), self._out_dir)).as_posix()

    def check_all(self, pairs: Sequence[Pair], *, among: Sequence[Pair], keep: bool) -> None:
        """Refuse, before any work, outputs that would replace what they must not.

        Raises:
            OutputError: If an output is an input of any pair, or, unasked, a file that no batch has made.
        """
        sources = {identity for work in among for path in work.sources if (identity := _identity(path))}
        existing = []
        for work in pairs:
            for path in [] if work.problem is not None else self._paths(work):
                if os.path.lexists(path):
                    if _identity(path) in sources:
                        raise OutputError(
                            f"{path}: an output must not replace an input", "choose another output folder, or --format"
                        )
                    existing.append((work, path))
        self._refuse_foreign([(work, path) for work, path in existing if not _is_folder(path)], keep=keep)

    def check(self, work: Pair) -> None:
        """Refuse outputs of one pair that cannot or must not be written.

        Raises:
            OutputError: If one leads elsewhere by a link, is a folder, or would replace a file unasked.
        """
        for path, folder in zip(self._paths(work), (self._out_dir, self._preview_dir), strict=False):
            if folder is not None and not _is_below(path.parent, folder):
                raise OutputError(f"{path}: must not lead out of {folder} by a link", "remove the link")
            if _is_folder(path):
                raise OutputError(f"{path}: an output must be a file; this is a folder", "move it away")
            if os.path.lexists(path) and self._must_stay(work, path):
                raise OutputError(f"{path}: must not exist yet; it does", "--overwrite replaces it")

    def write(self, work: Pair, files: Mapping[Location, bytes], entry: Entry) -> None:
        """Write a pair's files as a whole, with their line in the journal.

        Raises:
            OutputError: If that fails; then older files are untouched.
        """
        # Once more: the network may have taken long, and a folder may have become a link.
        self.check(work)
        local = {path: data for path, data in files.items() if isinstance(path, Path)}
        for path in local:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(
                    f"{path}: its folder must be writable; got {error.strerror or error}",
                    "choose another output folder",
                ) from error
        # First the journal: then there is never an output that nobody knows of.
        self._journal.add(entry)
        writing.write_files(local)

    def open(self, pairs: Sequence[Pair]) -> Claims:
        """Make the folders, tidy them, and register in the output folder as being at work.

        Raises:
            OutputError: If they cannot be made.
        """
        for folder in (self._out_dir, self._preview_dir):
            if folder is not None:
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    reason = error.strerror or str(error)
                    raise OutputError(
                        f"{folder}: must be a folder or a free name; got {reason}", "choose another one"
                    ) from error
        claims = FolderClaims(self._out_dir)
        self._sweep(pairs, claims)
        return claims

    def join(self, mark: str) -> Claims:
        """Register as a worker of a batch that has opened the outputs.

        Raises:
            OutputError: If this is another folder, as on another machine's own disk.
        """
        if self._out_dir.is_dir():
            claims = FolderClaims(self._out_dir)
            if claims.identity() == mark:
                return claims
            claims.close()
        raise OutputError(
            f"{self._out_dir}: must be one and the same folder for all machines of the cluster; it is not",
            "choose one that they share, or an object store",
        )

    def mark(self, claims: Claims) -> str:
        """Return what tells this output folder from all others of its name."""
        return claims.identity() if isinstance(claims, FolderClaims) else ""

    def close(self, pairs: Sequence[Pair], claims: Claims) -> None:
        """Tidy up, and register as being gone."""
        self._sweep(pairs, claims)
        claims.close()

    def _sweep(self, pairs: Sequence[Pair], claims: Claims) -> None:
        """Remove what killed processes left, unless others are at work and it may be theirs."""
        folders = _folders(pairs, self._out_dir)
        previews = set() if self._preview_dir is None else _folders(pairs, self._preview_dir)
        inside = {folder for folder in previews if _is_below(folder, self._out_dir)}
        # By age everywhere: who writes here need not have a claim here, as a batch into a folder below, or one file.
        if isinstance(claims, FolderClaims):
            with claims.alone() as alone:
                if alone:
                    remove_leftovers(folders | inside, age=_OLD)
        remove_leftovers(previews - inside - folders, age=_OLD)

    def _paths(self, work: Pair) -> list[Path]:
        return [path for path in self._files(work) if isinstance(path, Path)]


class StoreOutputs(Outputs):
    """Outputs on an object store, where a file appears as a whole, and nothing can be locked."""

    def __init__(
        self, out_dir: RemotePath, preview_dir: RemotePath | None, journal: StoreJournal, *, overwrite: bool
    ) -> None:
        for folder in (out_dir, preview_dir):
            if folder is not None:
                check_store(folder)
        super().__init__(out_dir, preview_dir, journal, overwrite=overwrite)
        self._store, self._store_journal = out_dir, journal
        self._preview_store = preview_dir

    def relative(self, path: Location) -> str:
        """Return how the journal calls a preview."""
        return path.relative_to(self._store) if isinstance(path, RemotePath) else str(path)

    def check_all(self, pairs: Sequence[Pair], *, among: Sequence[Pair], keep: bool) -> None:
        """Refuse, before any work, outputs that would replace what they must not.

        Raises:
            OutputError: If an output is an input of any pair, or, unasked, a file that no batch has made.
        """
        sources = {str(path) for work in among for path in work.sources}
        there = {str(path) for path in self._store.find().values()}
        if self._preview_store is not None:
            there |= {str(path) for path in self._preview_store.find().values()}
        existing = []
        for work in pairs:
            for path in [] if work.problem is not None else self._files(work):
                if str(path) in sources:
                    raise OutputError(
                        f"{path}: an output must not replace an input", "choose another output folder, or --format"
                    )
                if str(path) in there:
                    existing.append((work, path))
        self._refuse_foreign(existing, keep=keep)

    def check(self, work: Pair) -> None:
        """Refuse outputs of one pair that would replace a file unasked.

        Raises:
            OutputError: If one would.
        """
        for path in self._files(work):
            if not self._may_replace(work, path) and path.is_file() and self._must_stay(work, path):
                raise OutputError(f"{path}: must not exist yet; it does", "--overwrite replaces it")

    def write(self, work: Pair, files: Mapping[Location, bytes], entry: Entry) -> None:
        """Write a pair's files, each as a whole, after their entry in the journal.

        Raises:
            OutputError: If that fails.
        """
        self._journal.add(entry)
        for path, data in files.items():
            if isinstance(path, RemotePath):
                path.write_bytes(data)

    def open(self, pairs: Sequence[Pair]) -> Claims:
        """Begin; there is nothing to make."""
        return NoClaims()

    def join(self, mark: str) -> Claims:
        """Begin as a worker."""
        return NoClaims()

    def mark(self, claims: Claims) -> str:
        """Return nothing: a URL is the same for all."""
        return ""

    def close(self, pairs: Sequence[Pair], claims: Claims) -> None:
        """Put the journal together."""
        self._store_journal.merge()


def open_outputs(out_dir: Location, preview_dir: Location | None, journal: Journal, *, overwrite: bool) -> Outputs:
    """Return the outputs of a batch.

    Raises:
        ArgumentError: If the place cannot take outputs, or previews are to go to another kind of place.
    """
    if isinstance(out_dir, RemotePath) and isinstance(journal, StoreJournal):
        if preview_dir is None or isinstance(preview_dir, RemotePath):
            same = preview_dir is None or preview_dir.protocol == out_dir.protocol
            if same:
                return StoreOutputs(out_dir, preview_dir, journal, overwrite=overwrite)
    elif isinstance(out_dir, Path) and isinstance(journal, FolderJournal):
        if preview_dir is None or isinstance(preview_dir, Path):
            return FolderOutputs(out_dir, preview_dir, journal, overwrite=overwrite)
    raise ArgumentError(f"--preview must be on the same store as OUT_DIR = {out_dir}; got {preview_dir}")


def _folders(pairs: Sequence[Pair], root: Path) -> set[Path]:
    folders = {(root / work.name).parent for work in pairs if work.problem is None}
    return {folder for folder in folders if _is_below(folder, root)}


def _identity(path: Location) -> tuple[int, int] | None:
    if isinstance(path, RemotePath):
        return None
    with contextlib.suppress(OSError, ValueError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def _is_folder(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.is_dir()
    return False  # no name that the system takes


def _is_below(folder: Path, root: Path) -> bool:
    """Tell whether a folder, all links followed, lies in another one; neither need exist."""
    with contextlib.suppress(OSError, RuntimeError):
        return folder.resolve().is_relative_to(root.resolve())
    return False
