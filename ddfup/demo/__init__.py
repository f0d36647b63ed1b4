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
from ddfup.errors import OutputError
from ddfup.metrics import rmse

if TYPE_CHECKING:
    from ddfup.inference import Upsampler

FACTOR = 8
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


def check_folder(folder: Path) -> None:
    """Refuse, before any work, an output folder that cannot be used; make it if there is none.

    Raises:
        OutputError: If it is a file, or cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: must be a folder or become one; got {error.strerror or error}",
            "choose another with -o",
        ) from error
    writing.check_writable(folder / "depth_up.png")


def run(folder: Path, upsampler: Upsampler) -> Outcome:
    """Degrade the scene's depth, upsample it, measure, and write input, result and pictures.

    Args:
        folder: Existing folder; files of an earlier demo are replaced.
        upsampler: What upsamples.

    Raises:
        OutputError: If writing fails.
    """
    from ddfup.preview import errors, side_by_side

    guide, truth = load_pair()
    low = degrade(truth, FACTOR, "bicubic")
    start = time.perf_counter()
    result = upsampler(low, guide)
    seconds = time.perf_counter() - start
    plain = {kind: resize(low, truth.shape, kind) for kind in ("bicubic", "bilinear")}
    rmse_mm = {name: 1000 * rmse(array, truth) for name, array in {"ddfup": result, **plain}.items()}
    png, unit, dtype = io.FORMATS["png"], io.UNITS["mm"], np.dtype(np.uint16)
    notes = {"model": upsampler.model_name, "weights_sha256": upsampler.weights_sha256, "software": "ddfup"}
    source = guide_path()
    pictures = {
        "preview.png": side_by_side(guide, low, result, label="m"),
        "errors.png": errors(truth, {"bicubic": plain["bicubic"], "ddfup": result}, label="m"),
    }
    files = {
        folder / source.name: source.read_bytes(),
        folder / "depth.png": io.encode_depth(low, dtype=dtype, unit=unit, target=png),
        folder / "depth_up.png": io.encode_depth(result, dtype=dtype, unit=unit, target=png, notes=notes),
        **{folder / name: writing.encode_image(Path(name), picture) for name, picture in pictures.items()},
    }
    writing.write_files(files)
    height, width = truth.shape
    return Outcome(list(files), width, height, seconds, rmse_mm)
