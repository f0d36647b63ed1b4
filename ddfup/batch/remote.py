"""Files behind URLs (s3://, gs://, ...), by fsspec: so much of a path as a batch needs."""

from __future__ import annotations

import contextlib
import posixpath
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from ddfup.errors import ArgumentError, DDFUpError, InputError, OutputError

# Here a file appears as a whole or not at all, so that an output needs no temporary name.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"}
# What fsspec's own message leaves out: the package that knows the protocol.
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


@dataclass(frozen=True)
class RemotePath:
    """A file or folder behind a URL.

    Attributes:
        url: Protocol and path, without a slash at the end.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    @property
    def protocol(self) -> str:
        """What stands before ``://``."""
        return self.url.partition("://")[0]

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """Suffix of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    @cached_property
    def path(self) -> str:
        """The path as its file system calls it."""
        return str(self.system._strip_protocol(self.url))

    @property
    def system(self) -> Any:
        """The file system (fsspec keeps one for each kind).

        Raises:
            ArgumentError: If there is none for this protocol, or its package is missing.
        """
        import fsspec

        try:
            return fsspec.filesystem(self.protocol)
        except (ImportError, ValueError) as error:
            package = _PACKAGES.get(self.protocol, "")
            raise ArgumentError(
                f"{self.url}: must be a URL that fsspec can open; got {error}",
                f"pip install {package}" if package else "s3://, gs:// and az:// are known",
            ) from error

    def absolute(self) -> RemotePath:
        """Return the path itself."""
        return self

    def is_dir(self) -> bool:
        """Tell whether there is something below this path."""
        with _reaching(self):
            return bool(self.system.isdir(self.path))

    def is_file(self) -> bool:
        """Tell whether there is such a file."""
        # A listing from before would hide what others have written since.
        self.system.invalidate_cache()
        with _reaching(self):
            return bool(self.system.isfile(self.path))

    def read_bytes(self) -> bytes:
        """Return the whole content.

        Raises:
            InputError: If it cannot be read.
        """
        with _reaching(self):
            return bytes(self.system.cat_file(self.path))

    def write_bytes(self, data: bytes) -> None:
        """Write the file as a whole.

        Raises:
            OutputError: If that fails.
        """
        try:
            self.system.pipe_file(self.path, data)
        except Exception as error:  # each store raises its own kinds
            raise OutputError(
                f"{self.url}: must be writable ({len(data)} bytes); got {_reason(error)}", "see the bucket's rights"
            ) from error

    def unlink(self) -> None:
        """Remove the file; that it is gone already is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(self.path)

    def find(self) -> dict[str, RemotePath]:
        """Return all files below this folder, by their path relative to it."""
        self.system.invalidate_cache()
        with _reaching(self):
            found = self.system.find(self.path)
        return {name: self / name for name in (posixpath.relpath(path, self.path) for path in found)}

    def glob(self) -> list[RemotePath]:
        """Return the files that this path, as a pattern, stands for."""
        with _reaching(self):
            found = self.system.glob(self.path, detail=True)
        start = self.url[: len(self.url) - len(self.path)]
        return [RemotePath(start + path) for path, entry in found.items() if entry["type"] == "file"]

    def relative_to(self, folder: RemotePath) -> str:
        """Return the path as seen from a folder on the same store."""
        return posixpath.relpath(self.path, folder.path)


Location: TypeAlias = Path | RemotePath


def parse_location(text: str) -> Location:
    """Return what a path or URL stands for; ``file://`` is a local path."""
    protocol, mark, _ = text.partition("://")
    if not mark or not protocol.isalnum():
        return Path(text)
    if protocol.lower() in ("file", "local"):
        from fsspec.implementations.local import LocalFileSystem

        return Path(LocalFileSystem._strip_protocol(text))
    return RemotePath(text.rstrip("/"))


def check_store(folder: RemotePath) -> None:
    """Refuse a place in which a file could be seen half written.

    Raises:
        ArgumentError: If it is no object store.
    """
    if folder.protocol not in _OBJECT_STORES:
        raise ArgumentError(
            f"OUT_DIR must be a folder or on an object store (s3, gs, az); got {folder}",
            "only these write a file as a whole",
        )
    # Whether the package is there is to be known before any work.
    _ = folder.system


@contextlib.contextmanager
def local_copies(*sources: Location) -> Iterator[Sequence[Path]]:
    """Give readers, which want files, what lies behind URLs; messages name the URLs.

    Yields:
        One path for each source: itself if it is local, else a copy for the time of the block.

    Raises:
        InputError: If a source cannot be read.
    """
    if not any(isinstance(source, RemotePath) for source in sources):
        yield [source for source in sources if isinstance(source, Path)]
        return
    with tempfile.TemporaryDirectory(prefix="ddfup-") as folder:
        copies = [
            Path(folder, f"{index}{source.suffix[:16]}") if isinstance(source, RemotePath) else source
            for index, source in enumerate(sources)
        ]
        for source, copy in zip(sources, copies, strict=True):
            if isinstance(source, RemotePath):
                with _reaching(source):
                    source.system.get_file(source.path, str(copy))
        try:
            yield copies
        except DDFUpError as error:
            for source, copy in zip(sources, copies, strict=True):
                error.message = error.message.replace(str(copy), str(source))
            raise


@contextlib.contextmanager
def _reaching(place: RemotePath) -> Iterator[None]:
    try:
        yield
    except DDFUpError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{place}: must exist; there is no such file", "check the URL") from error
    except Exception as error:  # each store raises its own kinds
        raise InputError(
            f"{place}: must be readable; got {_reason(error)}", "check the URL, and what the store wants to know you by"
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
