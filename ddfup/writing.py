"""Writing files: checked before any work, whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import secrets
from collections.abc import Mapping
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
        OutputError: If ``path`` is a folder, or its folder is missing or closed.
    """
    if path.is_dir():
        raise OutputError(f"{path}: an output must be a file; this is a folder", f"example: -o {path / 'depth.png'}")
    if path.parent.exists() and not path.parent.is_dir():
        raise OutputError(f"{path}: its folder must be one; {path.parent} is a file", "choose another place with -o")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: its folder must exist; {path.parent} does not", f"mkdir -p '{path.parent}'")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: its folder must be writable; {path.parent} is not", "choose another place with -o")


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write files as a whole: each to a temporary file in its folder, flushed to disk; then all are renamed.

    Raises:
        OutputError: If one of them fails; then nothing is left over and older files are untouched.
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
