"""`ddfup batch --report`: where the page and the table go, and that they replace nothing but older ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ddfup import writing
from ddfup.batch.remote import Location, RemotePath
from ddfup.errors import OutputError
from ddfup.report import BATCH_FILES, batch_report, is_batch_report


class ReportFiles:
    """The report of one batch, or of one part of it.

    Args:
        out_dir: The batch's output folder, into which it goes.
        preview_dir: Folder of previews, or None.
        part: Which part of the pairs (from 0), and the number of parts.
        overwrite: Whether any file of its name may be replaced.

    Raises:
        OutputError: If a file is in the way that is no such report.
    """

    def __init__(
        self, out_dir: Location, preview_dir: Location | None, part: tuple[int, int], *, overwrite: bool
    ) -> None:
        self._out_dir = out_dir
        self._preview_dir = preview_dir
        mark = f".{part[0]}-of-{part[1]}" if part[1] > 1 else ""
        self._places: dict[str, Location] = {}
        for name in BATCH_FILES:
            stem, _, suffix = name.partition(".")
            self._places[name] = place = out_dir / f"{stem}{mark}.{suffix}"
            if not overwrite and place.is_file() and not is_batch_report(name, place.read_bytes()):
                raise OutputError(f"{place}: must not exist yet; it is no report of a batch", "--overwrite replaces it")
        self._records: list[dict[str, Any]] = []
        self._previews: dict[str, str] = {}

    @property
    def page(self) -> Location:
        """Where the page goes."""
        return self._places[BATCH_FILES[0]]

    def add(self, record: dict[str, Any], name: str) -> None:
        """Take what became of a pair.

        Args:
            record: With the keys that the command line prints.
            name: Its output's name below the output folder.
        """
        self._records.append(record)
        if self._preview_dir is not None and record["status"] != "failed":
            self._previews[record["out"]] = quote(os.fsencode(self._address(self._preview_dir / f"{name}.jpg")))

    def write(self, seconds: float) -> None:
        """Write the report.

        Args:
            seconds: How long the batch took.

        Raises:
            OutputError: If that fails.
        """
        files = batch_report(self._records, title=str(self._out_dir), seconds=seconds, previews=self._previews)
        for name, data in files.items():
            place = self._places[name]
            if isinstance(place, RemotePath):
                place.write_bytes(data)
            else:
                writing.write_files({place: data})

    def _address(self, preview: Location) -> str:
        if isinstance(preview, RemotePath) and isinstance(self._out_dir, RemotePath):
            return preview.relative_to(self._out_dir)
        return Path(os.path.relpath(str(preview), str(self._out_dir))).as_posix()
