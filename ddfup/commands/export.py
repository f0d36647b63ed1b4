"""`ddfup export`: a network as a file for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ddfup.options import (
    ConfigOption,
    DebugOption,
    DryRunOption,
    JsonOption,
    ModelOption,
    OverwriteOption,
    QuietOption,
    VerboseOption,
    read_size,
)
from ddfup.terminal import Terminal, reported


def export(
    ctx: typer.Context,
    kind: Annotated[
        Literal["onnx", "pt2"],
        typer.Argument(metavar="onnx|pt2", help="ONNX, or PyTorch's own format.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE", help="Default: <model>_x<ratio>.onnx or .pt2.", show_default=False),
    ] = None,
    model: ModelOption = None,
    ratio: Annotated[float, typer.Option("--ratio", min=1, max=32, help="Guide over depth.")] = 8,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="WxH",
            help="Serve only guides of this size. Default: any size in whole cells.",
            show_default=False,
        ),
    ] = None,
    depth_size: Annotated[
        str | None,
        typer.Option(
            "--depth-size",
            metavar="WxH",
            help="With --size: serve only depth of this size. Default: --size over --ratio.",
            show_default=False,
        ),
    ] = None,
    content: Annotated[
        Literal["program", "compiled"],
        typer.Option(
            "--content",
            help="Of pt2: a program for torch.export.load, or code compiled for this kind of processor (AOTInductor), "
            "which takes a C++ compiler and minutes.",
        ),
    ] = "program",
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
    config: ConfigOption = None,
) -> None:
    """Write a network as a file for other runtimes, checked against PyTorch.

    Inputs: depth (1, 1, h, w) float32 in any unit, guide (1, 3, H, W) float32 in [0, 1], valid (1, 1, h, w) bool; depth
    that is not valid may hold anything. Output: result (1, 1, H, W) float32 in the unit of the depth, without holes.

    Fixed: the layers, which depend on the ratio. Free: both sizes, as long as guide over depth stays in the range of
    ratios with the same layers (--ratio 8: 7.5 to 14.9; the file says which), the guide's sides are multiples of its
    cell (8 there), and the depth's are 2 to 4096. --size fixes the sizes instead, whatever they are.
    """
    terminal = ctx.ensure_object(Terminal)
    record: dict[str, Any] = {"out": None if out is None else str(out), "status": "failed", "error": None}
    record |= dict.fromkeys(("kind", "content", "model", "weights_sha256", "ratio", "bytes", "deviation", "seconds"))
    with reported(record, as_json):
        from ddfup import writing
        from ddfup.export import run
        from ddfup.models import DEFAULT_MODEL, find_model

        info = find_model(model or DEFAULT_MODEL)
        settings = run.Settings(
            kind,
            info.path,
            ratio,
            read_size("--size", size) if size else None,
            read_size("--depth-size", depth_size) if depth_size else None,
            content,
        )
        path = out or Path(f"{info.name}_x{ratio:g}.{kind}")
        record |= {"out": str(path), "kind": kind, "model": info.name, "weights_sha256": info.sha256}
        writing.refuse_inputs(path, info.path)
        writing.check_writable(path)
        writing.refuse_existing(path, overwrite=overwrite)
        if dry_run:
            record |= {"status": "ok", "dry_run": True}
            terminal.note(f"would write {path}")
            return
        with terminal.working("exporting; this takes a minute or more"):
            exported = run.export(settings)
        run.write(path, exported)
        record |= {"status": "ok", "content": exported.content, "bytes": len(exported.data)}
        record |= {"ratio": settings.ratio, "deviation": exported.deviation, "seconds": exported.seconds}
        record |= {"metadata": exported.metadata}
        sizes = exported.metadata
        serves = (
            f"guides of {sizes['guide_size']} with depth of {sizes['depth_size']}"
            if "guide_size" in sizes
            else f"ratios {sizes['ratio_from']} to {sizes['ratio_below']}, guides in multiples of "
            f"{sizes['guide_multiple']} pixels"
        )
        terminal.note(
            f"wrote {path}: {exported.content}, {len(exported.data) / 1e6:.1f} MB, {serves}; off by "
            f"{exported.deviation:.1g} of the depth's range at most ({exported.cases} sizes tried), "
            f"{exported.seconds:.0f} s"
        )
