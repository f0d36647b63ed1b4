"""One pair of files from start to end: check everything first, then read, upsample, write."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddfup import io, writing
from ddfup.errors import ArgumentError, InputError, OutputError
from ddfup.pointcloud import Camera, PointCloud, encode_ply, find_points

if TYPE_CHECKING:
    from ddfup.inference import Upsampler


@dataclass(frozen=True)
class Options:
    """How files are read and written.

    Attributes:
        unit: Meaning of stored depth; None: integers are millimetres, floats metres.
        invalid: Stored values that mean "no measurement".
        format: Name of the output format; None: by the output's suffix, else the depth's own.
        preview: Picture to write as well, or None.
        overwrite: Whether outputs may replace files.
        skip_existing: Whether an existing output means that nothing is to be done.
        fill: Whether to give depth where the input has none, too.
        max_pixels: Largest number of pixels of an input.
        confidence: Confidence map of the depth, or None.
        min_confidence: Pixels of less confidence have no measurement.
        pointcloud: Point cloud to write as well, or None.
        raw: (width, height) of depth and confidence files without a header, perhaps the depth's type; or None.
    """

    unit: io.Unit | None = None
    invalid: tuple[float, ...] = io.DEFAULT_INVALID
    format: str | None = None
    preview: Path | None = None
    overwrite: bool = False
    skip_existing: bool = False
    fill: bool = False
    max_pixels: int = io.DEFAULT_MAX_PIXELS
    confidence: Path | None = None
    min_confidence: int = io.DEFAULT_MIN_CONFIDENCE
    pointcloud: PointCloud | None = None
    raw: io.Raw | None = None


@dataclass(frozen=True)
class Plan:
    """A pair that passed every check that needs no decoding.

    Attributes:
        depth: Depth file.
        guide: Guide file.
        out: Output file; None: the bytes go to the caller.
        target: Format of the output.
        width: Columns of the output.
        height: Rows of the output.
        factor: Output width over depth width.
        done: Whether the output exists and is to be kept.
        camera: The guide's camera, if a point cloud is wanted.
    """

    depth: Path
    guide: Path
    out: Path | None
    target: io.Format
    width: int
    height: int
    factor: float
    done: bool
    camera: Camera | None = None


@dataclass(frozen=True)
class Inputs:
    """A decoded pair.

    Attributes:
        depth: Depth map.
        guide: (H, W, 3) guide.
        dtype: Type of the output.
        unit: Unit of the output.
        seconds: Time for reading.
    """

    depth: io.DepthMap
    guide: NDArray[np.uint8] | NDArray[np.uint16]
    dtype: np.dtype[Any]
    unit: io.Unit
    seconds: float


@dataclass(frozen=True)
class Result:
    """What became of a pair.

    Attributes:
        data: Bytes of the depth file.
        seconds: Time for reading, upsampling, encoding and writing.
        valid_fraction: Share of output pixels that hold depth.
        notes: Things the user should know, one sentence each.
        points: Number of points of the point cloud, if there is one.
    """

    data: bytes
    seconds: float
    valid_fraction: float
    notes: list[str] = field(default_factory=list)
    points: int | None = None


def plan(depth: Path, guide: Path, out: str | Path | None, options: Options) -> Plan:
    """Check a pair before any work.

    Args:
        depth: Depth file.
        guide: Guide file.
        out: Output file; ``"-"``: none; None: the depth's name with ``_up`` beside it.
        options: How to read and write.

    Raises:
        ArgumentError: If options contradict each other.
        InputError: If a file is missing, of the wrong kind or size, or the two do not fit.
        OutputError: If an output cannot be written, or would replace an input or, unasked, another file.
    """
    if options.preview is not None:
        writing.check_image_suffix(options.preview)
    row, header = io.read_depth_header(depth, unit=options.unit, max_pixels=options.max_pixels, raw=options.raw)
    picture = io.read_guide_header(guide, max_pixels=options.max_pixels)
    io.check_pair(depth, (header.width, header.height), guide, (picture.width, picture.height))
    if options.confidence is not None:
        io.check_confidence(options.confidence, header, max_pixels=options.max_pixels, raw=options.raw)
    camera = None if options.pointcloud is None else _camera(options, options.pointcloud, picture)
    sides = (options.preview, None if options.pointcloud is None else options.pointcloud.path)
    sources = [file for file in (depth, guide, options.confidence) if file is not None]
    for file in (out, *sides):
        if file is not None and file != "-":
            writing.refuse_inputs(Path(file), *sources)
    path, target = _output(depth, out, row, options.format)
    outputs = [file for file in (path, *sides) if file is not None]
    for first, second in itertools.combinations(outputs, 2):
        if writing.same_file(first, second):
            raise OutputError(f"{first}: two outputs must be two files; got one name", "give one of them another name")
    done = path is not None and options.skip_existing and path.is_file()
    for file in [] if done else outputs:
        writing.check_writable(file)
        writing.refuse_existing(file, overwrite=options.overwrite)
    width, height = picture.width, picture.height
    return Plan(depth, guide, path, target, width, height, width / header.width, done, camera)


def read(work: Plan, options: Options) -> Inputs:
    """Read and decode a pair.

    Raises:
        InputError: If a file is damaged, holds no valid pixel, or does not fit the output's type.
    """
    start = time.perf_counter()
    depth = io.read_depth(
        work.depth,
        unit=options.unit,
        invalid=options.invalid,
        max_pixels=options.max_pixels,
        confidence=options.confidence,
        min_confidence=options.min_confidence,
        raw=options.raw,
    )
    dtype, unit = io.storage(depth, work.target)
    try:
        io.check_range(depth.depth, dtype, unit)
    except InputError as error:
        raise InputError(f"{work.depth}: {error.message}", error.hint) from error
    guide = io.read_guide(work.guide, max_pixels=options.max_pixels)
    return Inputs(depth, guide, dtype, unit, time.perf_counter() - start)


def _label(unit: io.Unit) -> str:
    return f" {unit.label}" if unit.label else ""


def _suspicious(source: io.DepthMap) -> list[str]:
    """Say so if depth is the largest number of its type, which cameras and renderers use as a mark."""
    if source.unit.coding or (source.dtype.kind == "u" and source.dtype.itemsize == 1):
        return []
    most = io.limits(source.dtype, source.unit)[1]
    count = int(np.count_nonzero(source.depth[source.valid] >= np.float32(most)))
    if not count:
        return []
    mark = f"{np.finfo(source.dtype).max:g}" if source.dtype.kind == "f" else str(np.iinfo(source.dtype).max)
    return [
        f"{count} low-resolution pixels have the largest value of {source.dtype}, {mark}: "
        f"if that means no measurement, say --invalid 0,{mark}"
    ]


def run(work: Plan, inputs: Inputs, upsampler: Upsampler, options: Options) -> Result:
    """Upsample, encode and, if there is an output file, write.

    Raises:
        ArgumentError: If the tiles are too small for the network.
        OutputError: If writing fails; nothing is left over then.
        DeviceError: If the device cannot do it.
    """
    start = time.perf_counter()
    source, guide, dtype, unit = inputs.depth, inputs.guide, inputs.dtype, inputs.unit
    try:
        depth = upsampler(source.depth, guide, valid=source.valid, fill=options.fill)
    except ArgumentError as error:
        # In Python the side of a tile is an argument; here it came from an option.
        if not error.message.startswith("tile "):
            raise
        raise ArgumentError(f"--{error.message}", error.hint) from error
    notes = _suspicious(source)
    # Integers mark invalid pixels with 0: it can be a disparity only where none is marked, here or in the input.
    zero_is_valid = unit.per_metre is None and 0 not in options.invalid and bool(np.isfinite(depth).all())
    low, high = io.limits(dtype, unit, zero_is_valid=zero_is_valid)
    # The input fits, so these are the network's overshoots at the very ends of the range.
    below, beyond = int(np.count_nonzero(depth < low)), int(np.count_nonzero(depth > high))
    if below:
        least = max(low, float(source.depth[source.valid].min()))
        depth = np.where(depth < low, np.float32(least), depth)
        smallest = f"the smallest {'value' if unit.per_metre is None else 'depth'} of {dtype}, {low:g}{_label(unit)}"
        notes.append(f"{below} pixels came out below {smallest}, and were set to {least:g}{_label(unit)}")
    if beyond:
        depth = np.minimum(depth, np.float32(high))
        notes.append(f"{beyond} pixels came out above what {dtype} holds and were limited to {high:g}{_label(unit)}")
    details = {
        "model": upsampler.model_name,
        "weights_sha256": upsampler.weights_sha256,
        "software": "ddfup",
    }
    data = io.encode_depth(
        depth, dtype=dtype, unit=unit, target=work.target, notes=details, zero_is_valid=zero_is_valid
    )
    files: dict[Path, bytes] = {} if work.out is None else {work.out: data}
    if options.preview is not None:
        from ddfup.preview import side_by_side

        picture = side_by_side(guide, source.depth, depth, label=unit.label or "disparity")
        files[options.preview] = writing.encode_image(options.preview, picture)
    points = None
    if options.pointcloud is not None and work.camera is not None:
        cloud = find_points(depth, guide, work.camera, clean=options.pointcloud.clean)
        files[options.pointcloud.path], points = encode_ply(cloud), cloud.size
    writing.write_files(files)
    return Result(
        data=data,
        seconds=inputs.seconds + time.perf_counter() - start,
        valid_fraction=float(np.isfinite(depth).mean()),
        notes=notes,
        points=points,
    )


def _camera(options: Options, request: PointCloud, picture: io.GuideHeader) -> Camera:
    if options.unit is not None and options.unit.per_metre is None:
        raise ArgumentError("--pointcloud must have depth in metres; got --unit disparity", "leave one of them out")
    return request.camera(picture.width, picture.height)


def _output(depth: Path, out: str | Path | None, row: io.Format, name: str | None) -> tuple[Path | None, io.Format]:
    # Without a header there is no telling what a result would be.
    target = io.FORMATS[name or "npy"] if name or row.name not in io.FORMATS else row
    if out is None:
        suffix = depth.suffix if target is row else target.suffixes[0]
        path = depth.with_name(f"{depth.stem}_up{suffix}")
        writing.refuse_folder(path)
        return path, target
    if str(out) == "-":
        return None, target
    path = Path(out)
    writing.refuse_folder(path)
    by_suffix = io.format_of(path)
    if by_suffix is None:
        known = ", ".join(suffix for other in io.FORMATS.values() for suffix in other.suffixes)
        raise ArgumentError(f"-o must end in one of {known}; got {str(path)!r}", "example: -o depth_hd.png")
    if name and by_suffix is not target:
        raise ArgumentError(f"--format must agree with -o; got {name} and {str(path)!r}", "leave one of them out")
    return path, by_suffix
