"""The files that a batch writes: where they go, what they may replace, and that no others are touched."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ddfup import io
from ddfup.batch.journal import Claims, Entry, Journal, remove_leftovers
from ddfup.batch.pairing import Pair
from ddfup.errors import OutputError

# Seconds without change after which a temporary file outside the output folder is taken for a dead one.
_OLD = 60.0


class Outputs:
    """The output folder and, if wanted, the folder of previews.

    Args:
        out_dir: Output folder.
        preview_dir: Folder for previews, or None.
        journal: The journal of the output folder.
        overwrite: Whether files that are not from an earlier batch may be replaced.
    """

    def __init__(self, out_dir: Path, preview_dir: Path | None, journal: Journal, *, overwrite: bool) -> None:
        self._out_dir = out_dir
        self._preview_dir = preview_dir
        self._journal = journal
        self._overwrite = overwrite

    def out(self, work: Pair) -> Path:
        """Return where the depth goes."""
        return self._out_dir / work.name

    def preview(self, work: Pair) -> Path | None:
        """Return where the preview goes, if there is to be one."""
        # The whole name of the output, so that two outputs never have one preview.
        return None if self._preview_dir is None else self._preview_dir / f"{work.name}.jpg"

    def relative(self, path: Path) -> str:
        """Return how the journal calls a preview."""
        return Path(os.path.relpath(path, self._out_dir)).as_posix()

    def check_all(self, pairs: Sequence[Pair], *, keep: bool) -> None:
        """Refuse, before any work, outputs that would replace what they must not.

        Args:
            pairs: All pairs.
            keep: Whether outputs that exist are to stay, and so are in nobody's way.

        Raises:
            OutputError: If an output is an input of any pair, or, unasked, a file that no batch has made.
        """
        sources = {identity for work in pairs for path in (work.depth, work.guide) if (identity := _identity(path))}
        existing = []
        for work in pairs:
            for path in [] if work.problem is not None else self._files(work):
                if os.path.lexists(path):
                    if _identity(path) in sources:
                        raise OutputError(
                            f"{path}: an output must not replace an input", "choose another output folder, or --format"
                        )
                    existing.append((work, path))
        # After looking: what another process has made meanwhile is in its journal.
        self._journal.refresh()
        foreign = [path for work, path in existing if not self._may_replace(work, path) and not _is_folder(path)]
        if foreign and not keep:
            more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
            raise OutputError(
                f"{foreign[0]}: must not exist yet unless from an earlier batch; it does{more}",
                "--overwrite replaces, --skip-existing keeps such files",
            )

    def check(self, work: Pair) -> None:
        """Refuse outputs of one pair that cannot or must not be written.

        Raises:
            OutputError: If one leads elsewhere by a link, is a folder, or would replace a file unasked.
        """
        for path, folder in zip(self._files(work), (self._out_dir, self._preview_dir), strict=False):
            if folder is not None and not _is_below(path.parent, folder):
                raise OutputError(f"{path}: must not lead out of {folder} by a link", "remove the link")
            if _is_folder(path):
                raise OutputError(f"{path}: an output must be a file; this is a folder", "move it away")
            if os.path.lexists(path) and not self._may_replace(work, path):
                raise OutputError(f"{path}: must not exist yet; it does", "--overwrite replaces it")

    def write(self, work: Pair, files: Mapping[Path, bytes], entry: Entry) -> None:
        """Write a pair's files as a whole, with their line in the journal.

        Raises:
            OutputError: If that fails; then older files are untouched.
        """
        # Once more: the network may have taken long, and a folder may have become a link.
        self.check(work)
        for path in files:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(
                    f"{path}: its folder must be writable; got {error.strerror or error}",
                    "choose another output folder",
                ) from error
        # First the journal: then there is never an output that nobody knows of.
        self._journal.add(entry)
        io.write_files(files)

    def open(self, pairs: Sequence[Pair]) -> Claims:
        """Make the folders, and register in the output folder as being at work.

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
        claims = Claims(self._out_dir)
        self.sweep(pairs, claims)
        return claims

    def sweep(self, pairs: Sequence[Pair], claims: Claims) -> None:
        """Remove what killed processes left, unless others are at work and it may be theirs."""
        folders = _folders(pairs, self._out_dir)
        previews = set() if self._preview_dir is None else _folders(pairs, self._preview_dir)
        inside = {folder for folder in previews if _is_below(folder, self._out_dir)}
        with claims.alone() as alone:
            if alone:
                remove_leftovers(folders | inside)
        # Elsewhere another batch may be writing.
        remove_leftovers(previews - inside - folders, age=_OLD)

    def _files(self, work: Pair) -> list[Path]:
        preview = self.preview(work)
        return [self.out(work), *([] if preview is None else [preview])]

    def _may_replace(self, work: Pair, path: Path) -> bool:
        if self._overwrite:
            return True
        if path == self.preview(work):
            return self._journal.knows_preview(self.relative(path))
        return self._journal.knows(work.name)


def _folders(pairs: Sequence[Pair], root: Path) -> set[Path]:
    folders = {(root / work.name).parent for work in pairs if work.problem is None}
    return {folder for folder in folders if _is_below(folder, root)}


def _identity(path: Path) -> tuple[int, int] | None:
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
