"""The bundled scene (rendered by examples/render_demo.py) and what ``ddfup demo`` does with it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddfup import io, writing
from ddfup.degrade import degrade, resize
from ddfup.metrics import rmse

if TYPE_CHECKING:
    from ddfup.inference import Upsampler

FACTOR = 8
_PNG, _UNIT, _DTYPE = io.FORMATS["png"], io.UNITS["mm"], np.dtype(np.uint16)
_RESULTS = ("depth_up.png", "preview.png", "errors.png")
_FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Outcome:
    """What the demo measured and wrote.

    Attributes:
        files: Written files.
        width: Columns of the result.
        height: Rows of the result.
        seconds: Time of the upsampling alone.
        rmse_mm: Root mean square error in millimetres of ddfup and of plain interpolations.
    """

    files: list[Path]
    width: int
    height: int
    seconds: float
    rmse_mm: dict[str, float]


def guide_path() -> Path:
    """Return the bundled guide picture's file.

    Raises:
        FileNotFoundError: If it is not installed.
    """
    for name in ("guide.jpg", "guide.png"):
        if (_FOLDER / name).is_file():
            return _FOLDER / name
    raise FileNotFoundError(f"the demo's guide picture is not in {_FOLDER}; reinstall ddfup")


def load_pair() -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Load the bundled scene.

    Returns:
        Guide (H, W, 3) uint8 and true depth (H, W) float32 in metres, NaN where there is none.

    Example:
        >>> guide, depth = load_pair()
        >>> guide.shape[:2] == depth.shape
        True
    """
    return io.read_guide(guide_path()), io.read_depth(_FOLDER / "depth.png").depth


def check_files(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse, before any work, files that cannot be written, or would replace others than those of an earlier demo.

    A folder is that of an earlier demo if its photo and its low-resolution depth are the demo's, byte for byte: their
    names are such as a user's own files have.

    Args:
        folder: Existing folder.
        overwrite: Whether the user said that any file may be replaced.

    Raises:
        OutputError: If a file cannot be written, or must not.
    """
    inputs = _encode_inputs(_low(load_pair()[1]))
    ours = all(_holds(folder / name, data) for name, data in inputs.items())
    for name in (*inputs, *_RESULTS):
        writing.check_writable(folder / name)
        writing.refuse_existing(folder / name, overwrite=overwrite or ours)


def run(folder: Path, upsampler: Upsampler) -> Outcome:
    """Degrade the scene's depth, upsample it, measure, and write input, result and pictures.

    Args:
        folder: Existing folder; files in it are replaced.
        upsampler: What upsamples.

    Raises:
        OutputError: If writing fails.
    """
    from ddfup.preview import errors, side_by_side

    guide, truth = load_pair()
    low = _low(truth)
    start = time.perf_counter()
    result = upsampler(low, guide)
    seconds = time.perf_counter() - start
    plain = {kind: resize(low, truth.shape, kind) for kind in ("bicubic", "bilinear")}
    rmse_mm = {name: 1000 * rmse(array, truth) for name, array in {"ddfup": result, **plain}.items()}
    notes = {"model": upsampler.model_name, "weights_sha256": upsampler.weights_sha256, "software": "ddfup"}
    results = (
        io.encode_depth(result, dtype=_DTYPE, unit=_UNIT, target=_PNG, notes=notes),
        writing.encode_image(Path("preview.png"), side_by_side(guide, low, result, label="m")),
        writing.encode_image(
            Path("errors.png"), errors(truth, {"bicubic": plain["bicubic"], "ddfup": result}, label="m")
        ),
    )
    contents = {**_encode_inputs(low), **dict(zip(_RESULTS, results, strict=True))}
    files = {folder / name: data for name, data in contents.items()}
    writing.write_files(files)
    height, width = truth.shape
    return Outcome(list(files), width, height, seconds, rmse_mm)


def _low(truth: NDArray[np.float32]) -> NDArray[np.float32]:
    return degrade(truth, FACTOR, "bicubic")


def _encode_inputs(low: NDArray[np.float32]) -> dict[str, bytes]:
    """Return name -> content of the files that the demo starts from."""
    source = guide_path()
    return {
        source.name: source.read_bytes(),
        "depth.png": io.encode_depth(low, dtype=_DTYPE, unit=_UNIT, target=_PNG),
    }


def _holds(path: Path, data: bytes) -> bool:
    try:
        # The size first: a file of that name may be large, or no file.
        return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False
