"""Exported files, read back: what they say of themselves, and a function to call."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ddfup.errors import InputError
from ddfup.export import onnx_file, pt2_file
from ddfup.export.checks import Inputs


@dataclasses.dataclass(frozen=True)
class File:
    """An exported file.

    Attributes:
        content: "onnx", "program" or "compiled".
        metadata: What it says of itself.
        run: From depth, guide and valid to the result.
    """

    content: str
    metadata: dict[str, str]
    run: Callable[[Inputs], Tensor]


def read(path: Path, *, threads: int | None = None) -> File:
    """Read a file that `ddfup export` wrote.

    Args:
        path: The file, .onnx or .pt2.
        threads: CPU threads of ONNX Runtime; None, and for pt2 files: PyTorch's.

    Raises:
        InputError: If it is none.
        ArgumentError: If the packages for it are missing.
    """
    if path.suffix == ".onnx":
        onnx_file.check_packages()
    try:
        if path.suffix == ".onnx":
            data = path.read_bytes()
            content, metadata = "onnx", onnx_file.read_metadata(data)
            run = onnx_file.load(data, threads=threads)
        else:
            with zipfile.ZipFile(path) as archive:
                compiled = any("aotinductor" in name for name in archive.namelist())
            content = "compiled" if compiled else "program"
            metadata = pt2_file.read_metadata(path, compiled=compiled)
            run = pt2_file.load(path, compiled=compiled)
        if "model" not in metadata:
            raise ValueError("it names no model")
    # The runtimes have exceptions of their own for what they cannot read.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: must be a file of `ddfup export`; got {reason}") from error
    return File(content, metadata, run)
