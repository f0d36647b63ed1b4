"""Coloured points from a depth map: the camera, flying pixels, and PLY files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddfup.errors import ArgumentError, InputError

# Share of the depth by which neighbours must differ to count as a jump. A flat surface seen under 80 degrees by
# a camera of 300 pixels focal length changes by 2 % per pixel; larger cameras have a wider margin.
_JUMP = 0.03
_LARGEST_JSON = 1 << 20
_EXAMPLE = 'example: {"fx": 1450, "fy": 1450, "cx": 959.5, "cy": 719.5}'


@dataclass(frozen=True)
class Camera:
    """A pinhole camera; the centre of the top left pixel is (0, 0).

    Attributes:
        fx: Focal length across, pixels.
        fy: Focal length down, pixels.
        cx: Column of the optical axis.
        cy: Row of the optical axis.
    """

    fx: float
    fy: float
    cx: float
    cy: float


@dataclass(frozen=True)
class PointCloud:
    """A point cloud that is to be written, and how its camera is known: by numbers, a file, or an angle.

    Attributes:
        path: PLY file.
        fx: Focal length across, pixels of the guide.
        fy: Focal length down; None: that across.
        cx: Column of the optical axis; None: the middle.
        cy: Row of the optical axis; None: the middle.
        file: JSON file with these numbers or a 3x3 matrix.
        fov: Horizontal field of view, degrees.
        clean: Whether flying pixels are removed.
    """

    path: Path
    fx: float | None = None
    fy: float | None = None
    cx: float | None = None
    cy: float | None = None
    file: Path | None = None
    fov: float | None = None
    clean: bool = False

    def camera(self, width: int, height: int) -> Camera:
        """Return the camera of a guide.

        Args:
            width: The guide's columns.
            height: The guide's rows.

        Raises:
            ArgumentError: If the camera is given in no way, in several, or wrongly.
            InputError: If the JSON file cannot be used.
        """
        if self.path.suffix.lower() != ".ply":
            raise ArgumentError(
                f"--pointcloud must end in .ply; got {str(self.path)!r}", "example: --pointcloud cloud.ply"
            )
        numbers = any(value is not None for value in (self.fx, self.fy, self.cx, self.cy))
        ways = [
            name
            for name, given in (("--fx", numbers), ("--intrinsics", self.file), ("--fov", self.fov is not None))
            if given
        ]
        if len(ways) != 1:
            raise ArgumentError(
                f"--pointcloud must have one camera: --fx, --intrinsics or --fov; got {' and '.join(ways) or 'none'}",
                "--fov 60 is right for many phones" if not ways else "choose one",
            )
        if self.file is not None:
            return read_camera(self.file, width, height)
        middle = ((width - 1) / 2, (height - 1) / 2)
        if self.fov is not None:
            if not 0 < self.fov < 180:
                raise ArgumentError(
                    f"--fov must be between 0 and 180 degrees; got {self.fov:g}", "--fov 60 is right for many phones"
                )
            focal = width / 2 / math.tan(math.radians(self.fov) / 2)
            return Camera(focal, focal, *middle)
        if self.fx is None:
            raise ArgumentError("--fy, --cx and --cy must come with --fx; it is missing", "give --fx, or --fov alone")
        cx, cy = (given if given is not None else own for given, own in zip((self.cx, self.cy), middle, strict=True))
        camera = Camera(self.fx, self.fy if self.fy is not None else self.fx, cx, cy)
        problem = _problem(camera)
        if problem:
            raise ArgumentError(f"--{problem}")
        return camera


def _problem(camera: Camera) -> str:
    for name, value in vars(camera).items():
        if not math.isfinite(value) or (name in ("fx", "fy") and value <= 0):
            return f"{name} must be a {'positive ' if name in ('fx', 'fy') else ''}number of pixels; got {value:g}"
    return ""


def read_camera(path: Path, width: int, height: int) -> Camera:
    """Read a camera from JSON: ``fx``, ``fy``, ``cx``, ``cy``, or a 3x3 matrix ``K`` or ``intrinsics`` by rows.

    Args:
        path: The file.
        width: Columns of the picture that the camera took; if the file has ``width``, it must be the same.
        height: Its rows, likewise.

    Raises:
        InputError: If the file is not readable, or holds no such camera.
    """
    try:
        with path.open("rb") as stream:
            content = json.loads(stream.read(_LARGEST_JSON).decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: must be readable; got {error.strerror or error}", "check the path") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: must be a JSON file; got {str(error) or 'a deep nest'}", _EXAMPLE) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a JSON object; got {type(content).__name__}", _EXAMPLE)
    for name, size in (("width", width), ("height", height)):
        if content.get(name, size) != size:
            raise InputError(
                f"{path}: {name} must be that of the guide, the number {size}; got {content[name]!r}",
                "give the camera in pixels of the guide",
            )
    try:
        camera = _camera(path, content)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path}: must hold fx, fy, cx, cy or a 3x3 matrix K or intrinsics; got {', '.join(list(content)[:8])}",
            _EXAMPLE,
        ) from error
    problem = _problem(camera)
    if problem:
        raise InputError(f"{path}: {problem}", _EXAMPLE)
    return camera


def _camera(path: Path, content: dict[str, Any]) -> Camera:
    matrix = content.get("K", content.get("intrinsics"))
    if matrix is None:
        return Camera(*(float(content[name]) for name in ("fx", "fy", "cx", "cy")))
    k = np.asarray(matrix, np.float64).reshape(3, 3)
    if not (np.array_equal(k[2], (0, 0, 1)) and k[1, 0] == 0):
        raise InputError(
            f"{path}: the matrix must be [fx, 0, cx], [0, fy, cy], [0, 0, 1] by rows; got {k.ravel().tolist()}",
            "matrices by columns (Record3D, ARKit) must be transposed",
        )
    if k[0, 1] != 0:
        raise InputError(f"{path}: the matrix must have no skew; got {k[0, 1]:g}", "set that number to 0")
    return Camera(float(k[0, 0]), float(k[1, 1]), float(k[0, 2]), float(k[1, 2]))


def flying(depth: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Tell which pixels float between a near and a far surface, or alone before or behind all others.

    A pixel floats if along its row or its column one neighbour is nearer and the other farther, each by more
    than 3 %, or if all four neighbours are nearer or farther by as much. Thin objects stay: along them there is
    no jump. Pixels without depth are no neighbours.

    Args:
        depth: (H, W) metres; not finite = none.
    """
    between = np.zeros(depth.shape, np.bool_)
    alone = np.ones(depth.shape, np.bool_)
    for axis in (0, 1):
        steps = _steps(depth.swapaxes(0, axis))
        before, after = steps[:-1], steps[1:]
        between |= (before * after == 1).swapaxes(0, axis)
        alone &= (before * after != 0).swapaxes(0, axis)
    return between | alone


def _steps(depth: NDArray[np.floating[Any]]) -> NDArray[np.int8]:
    """Return the sign of the jump before each row and after the last one; 0 where there is none."""
    steps = np.zeros((depth.shape[0] + 1, depth.shape[1]), np.int8)
    first, second = depth[:-1], depth[1:]
    with np.errstate(invalid="ignore"):
        jump = np.abs(second - first) > _JUMP * np.minimum(first, second)
        steps[1:-1] = np.where(jump & np.isfinite(first) & np.isfinite(second), np.sign(second - first), 0)
    return steps


_VERTEX = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1")])


def find_points(
    depth: NDArray[np.floating[Any]],
    guide: NDArray[np.uint8] | NDArray[np.uint16],
    camera: Camera,
    *,
    clean: bool = False,
) -> NDArray[Any]:
    """Return a coloured point for every pixel that has depth.

    Args:
        depth: (H, W) metres along the optical axis; not finite or not above 0 = none.
        guide: (H, W, 3) RGB of 8 or 16 bits.
        camera: The guide's camera.
        clean: Whether pixels that are `flying` are left out.

    Returns:
        (N,) records x, y, z (metres; right, down, forward) and red, green, blue (8 bits), row by row.
    """
    kept = np.isfinite(depth) & (depth > 0)
    if clean:
        kept &= ~flying(depth)
    rows, columns = np.nonzero(kept)
    z = depth[kept].astype(np.float64)
    cloud = np.empty(z.size, _VERTEX)
    cloud["x"] = (columns - camera.cx) / camera.fx * z
    cloud["y"] = (rows - camera.cy) / camera.fy * z
    cloud["z"] = z
    colours = guide[kept]
    if colours.dtype == np.uint16:
        colours = colours >> 8
    for index, name in enumerate(("red", "green", "blue")):
        cloud[name] = colours[:, index]
    return cloud


def encode_ply(cloud: NDArray[Any]) -> bytes:
    """Return the bytes of a PLY file (binary, low byte first) of what `find_points` returns."""
    kinds = {"f": "float", "u": "uchar"}
    properties = [f"property {kinds[cloud.dtype[name].kind]} {name}" for name in cloud.dtype.names or ()]
    head = (
        "ply",
        "format binary_little_endian 1.0",
        "comment by ddfup; metres; x right, y down, z forward",
        f"element vertex {cloud.size}",
        *properties,
        "end_header",
    )
    return "\n".join(head).encode("ascii") + b"\n" + cloud.tobytes()
