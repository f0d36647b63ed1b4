"""`ddfup upsample`: one pair of files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ddfup.commands.upsampler import make_upsampler
from ddfup.errors import ArgumentError
from ddfup.options import (
    ConfigOption,
    DebugOption,
    DepthArgument,
    DeviceOption,
    DryRunOption,
    FillOption,
    FormatOption,
    GuideArgument,
    InvalidOption,
    JsonOption,
    MaxPixelsOption,
    MinConfidenceOption,
    ModelOption,
    OutOption,
    OverwriteOption,
    PrecisionOption,
    PreviewOption,
    QuietOption,
    RawOption,
    SkipOption,
    TileOption,
    UnitOption,
    VerboseOption,
    one_of,
    refuse_alone,
)
from ddfup.terminal import Terminal, data_stream, reported, say

ConfidenceOption = Annotated[
    Path | None,
    typer.Option(
        "--confidence",
        metavar="FILE",
        help="Confidence map of DEPTH: 0, 1, 2 (ARKit, Record3D).",
        show_default=False,
        readable=False,
    ),
]
PointCloudOption = Annotated[
    Path | None,
    typer.Option(
        "--pointcloud",
        metavar="FILE.ply",
        help="Also write coloured points; needs --fx, --intrinsics or --fov.",
        show_default=False,
    ),
]
FxOption = Annotated[
    float | None, typer.Option("--fx", help="Focal length across, pixels of GUIDE.", show_default=False)
]
FyOption = Annotated[float | None, typer.Option("--fy", help="Focal length down. Default: --fx.", show_default=False)]
CxOption = Annotated[
    float | None, typer.Option("--cx", help="Column of the optical axis. Default: the middle.", show_default=False)
]
CyOption = Annotated[
    float | None, typer.Option("--cy", help="Row of the optical axis. Default: the middle.", show_default=False)
]
IntrinsicsOption = Annotated[
    Path | None,
    typer.Option(
        "--intrinsics",
        metavar="FILE.json",
        help="The camera from a file: fx, fy, cx, cy or a 3x3 matrix K.",
        show_default=False,
        readable=False,
    ),
]
FovOption = Annotated[
    float | None,
    typer.Option("--fov", metavar="DEGREES", help="The camera from its horizontal angle.", show_default=False),
]
CleanEdgesOption = Annotated[
    bool, typer.Option("--clean-edges", help="Leave points out that float between near and far.")
]


def upsample(
    ctx: typer.Context,
    depth: DepthArgument,
    guide: GuideArgument,
    out: OutOption = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    tile: TileOption = "auto",
    unit: UnitOption = None,
    invalid: InvalidOption = "0,nan,inf",
    confidence: ConfidenceOption = None,
    min_confidence: MinConfidenceOption = 1,
    raw: RawOption = None,
    fill: FillOption = False,
    format: FormatOption = None,
    preview: PreviewOption = None,
    pointcloud: PointCloudOption = None,
    fx: FxOption = None,
    fy: FyOption = None,
    cx: CxOption = None,
    cy: CyOption = None,
    intrinsics: IntrinsicsOption = None,
    fov: FovOption = None,
    clean_edges: CleanEdgesOption = False,
    overwrite: OverwriteOption = False,
    skip_existing: SkipOption = False,
    dry_run: DryRunOption = False,
    max_pixels: MaxPixelsOption = 200_000_000,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
    config: ConfigOption = None,
) -> None:
    """Upsample one depth map to the size of its guide picture."""
    terminal = ctx.ensure_object(Terminal)
    record: dict[str, Any] = {"depth": str(depth), "guide": str(guide), "out": out, "status": "failed"}
    record |= dict.fromkeys(("error", "width", "height", "factor", "model", "device", "kernels", "seconds"))
    record |= {"valid_fraction": None}
    with reported(record, as_json):
        from ddfup import io, pair
        from ddfup.models import DEFAULT_MODEL, find_model
        from ddfup.pointcloud import PointCloud

        overwrite, skip_existing = one_of(ctx, overwrite=overwrite, skip_existing=skip_existing)
        refuse_alone(ctx, "min_confidence", "--confidence", confidence)
        if out == "-" and as_json:
            raise ArgumentError("--json and -o - must not share stdout", "give -o a file name")
        if out == "-" and data_stream().isatty():
            raise ArgumentError("-o - must go to a file or pipe; stdout is a terminal", "ddfup upsample ... -o - > x")
        cloud = None
        if pointcloud is not None:
            cloud = PointCloud(pointcloud, fx, fy, cx, cy, intrinsics, fov, clean_edges)
            record |= {"pointcloud": str(pointcloud), "points": None}
        elif clean_edges or any(value is not None for value in (fx, fy, cx, cy, intrinsics, fov)):
            raise ArgumentError(
                "the camera and --clean-edges must come with --pointcloud; it is missing",
                "add --pointcloud cloud.ply, or leave them out",
            )
        options = pair.Options(
            unit=io.parse_unit(unit) if unit else None,
            invalid=io.parse_invalid(invalid),
            format=format,
            preview=preview,
            overwrite=overwrite,
            skip_existing=skip_existing,
            fill=fill,
            max_pixels=max_pixels,
            confidence=confidence,
            min_confidence=min_confidence,
            pointcloud=cloud,
            raw=io.parse_size(raw) if raw else None,
        )
        work = pair.plan(depth, guide, out, options)
        size = f"{work.width}x{work.height} (x{work.factor:.4g})"
        target = "-" if work.out is None else str(work.out)
        record |= {"out": target, "width": work.width, "height": work.height, "factor": work.factor}
        if work.done:
            record["status"] = "skipped"
            terminal.note(f"skipped {target}: it exists")
            return
        if dry_run:
            record |= {"status": "ok", "model": find_model(model or DEFAULT_MODEL).name, "dry_run": True}
            terminal.note(f"would write {target}: {size}")
            return
        inputs = pair.read(work, options)
        given, values = inputs.depth, inputs.depth.depth[inputs.depth.valid]
        terminal.note(
            f"read {depth}: {given.dtype} in {given.unit.name}, {given.valid.mean():.1%} valid, "
            f"{values.min():.4g} to {values.max():.4g} {given.unit.label}",
            detail=True,
        )
        with terminal.working("loading the model"):
            upsampler = make_upsampler(model, device, precision, tile)
        with terminal.working(f"upsampling to {size}"):
            result = pair.run(work, inputs, upsampler, options)
        record |= {"model": upsampler.model_name, "device": upsampler.device, "kernels": upsampler.kernels}
        if work.out is None:
            say(result.data)
        record |= {"seconds": result.seconds, "valid_fraction": result.valid_fraction, "status": "ok"}
        for note in result.notes:
            terminal.note(f"note: {note}")
        if result.points is not None:
            record["points"] = result.points
            terminal.note(f"wrote {pointcloud}: {result.points} points")
        terminal.note(
            f"wrote {target}: {size}, {result.valid_fraction:.1%} valid, {upsampler.model_name} on "
            f"{upsampler.device} ({upsampler.kernels} kernels), {result.seconds:.2f} s"
        )
