"""Writing files: checked before any work, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddfup.errors import ArgumentError, OutputError


def encode_image(path: Path, image: NDArray[np.uint8]) -> bytes:
    """Return the bytes of a picture for ``path`` (.png, .jpg), from (H, W, 3) 8-bit RGB.

    Raises:
        ArgumentError: If the suffix is another one.
    """
    from PIL import Image

    buffer = io.BytesIO()
    kind = check_image_suffix(path)
    Image.fromarray(image).save(buffer, kind, quality=92)
    return buffer.getvalue()


def check_image_suffix(path: Path) -> str:
    """Return Pillow's name of the picture format for ``path``.

    Raises:
        ArgumentError: If the suffix is not .png, .jpg or .jpeg.
    """
    kinds = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
    if path.suffix.lower() not in kinds:
        raise ArgumentError(f"a picture must be .png or .jpg; got {str(path)!r}", "example: --preview preview.png")
    return kinds[path.suffix.lower()]


def check_writable(path: Path) -> None:
    """Refuse, before any work, an output that cannot be written.

    Raises:
        OutputError: If ``path`` is a folder, its folder is missing or closed, or there can be no such name.
    """
    refuse_folder(path)
    if path.parent.exists() and not path.parent.is_dir():
        raise OutputError(f"{path}: its folder must be one; {path.parent} is a file", "choose another place with -o")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: its folder must exist; {path.parent} does not", f"mkdir -p '{path.parent}'")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: its folder must be writable; {path.parent} is not", "choose another place with -o")


def refuse_folder(path: Path) -> None:
    """Refuse, before any work, an output that is a folder, or has a name that no file can have.

    Raises:
        OutputError: If it is, or has.
    """
    try:
        path.lstat()
        folder = path.is_dir()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise OutputError(
            f"{path}: an output must have a name that its folder takes; got {error.strerror or error}",
            "give a shorter name with -o: most file systems take 255 bytes"
            if error.errno == errno.ENAMETOOLONG
            else "choose another place with -o",
        ) from error
    if folder:
        raise OutputError(f"{path}: an output must be a file; this is a folder", f"example: -o {path / 'depth.png'}")


def refuse_inputs(path: Path, *sources: Path) -> None:
    """Refuse, before any work, an output that is one of the inputs, whatever may be replaced.

    Args:
        path: The output.
        sources: The inputs.

    Raises:
        OutputError: If it is one of them.
    """
    if any(same_file(path, source) for source in sources):
        raise OutputError(f"{path}: an output must not replace an input", "give it another name")


def same_file(first: Path, second: Path) -> bool:
    """Tell whether two paths name one file, also through links."""
    try:
        return first.samefile(second)
    except OSError:
        return first.absolute() == second.absolute()


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Make a folder if there is none, and its parents; what was made goes again if it is empty in the end.

    Raises:
        OutputError: If it is a file, or cannot be made.
    """
    made: list[Path] = []
    try:
        try:
            made += [place for place in (folder, *folder.parents) if not place.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder}: must be a folder or become one; got {error.strerror or error}", "choose another with -o"
            ) from error
        yield
    finally:
        for place in made:
            # Not empty, or there no more: then it is not ours to take away.
            with contextlib.suppress(OSError):
                place.rmdir()


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, an output that would replace a file, or a link whatever it leads to.

    Args:
        path: The output.
        overwrite: Whether the user said that it may.

    Raises:
        OutputError: If something is there.
    """
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path}: must not exist yet; it does", "--overwrite replaces it, or give another name")


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write files as a whole: each to a temporary file in its folder, flushed to disk; then all are renamed.

    Raises:
        OutputError: If one of them fails; no part of a file is left over then. Older files are untouched, unless a
            folder goes or closes between the renames: files renamed before stay, each of them whole.
    """
    # Random names of our own, not tempfile's, so that the files get the usual permissions.
    temporaries = {path: path.parent / f".ddfup-{secrets.token_hex(8)}.tmp" for path in files}
    current = Path()
    try:
        for current, data in files.items():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            with os.fdopen(os.open(temporaries[current], flags, 0o666), "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        for current in files:
            if current.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        for current, temporary in temporaries.items():
            temporary.replace(current)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise OutputError(
            f"{current}: must be writable ({len(files[current])} bytes); got {error.strerror or error}",
            "free some space, or choose another place with -o" if full else "choose another place with -o",
        ) from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
