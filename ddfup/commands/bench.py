"""`ddfup bench`: how fast things run on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ddfup.options import (
    ConfigOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    OverwriteOption,
    QuietOption,
    VerboseOption,
    read_size,
)
from ddfup.terminal import Terminal, print_table, reported, say

Dtype = Literal["float32", "float16", "bfloat16", "float64"]


def bench(
    ctx: typer.Context,
    part: Annotated[
        list[str] | None,
        typer.Option(
            "--part",
            metavar="op|module|network|end-to-end|export",
            help="What to measure; repeatable. Default: all, export where there are --exported files.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME|PATH",
            help="Model of network and end-to-end; repeatable. Default: all of them, and the default one.",
            show_default=False,
        ),
    ] = None,
    exported: Annotated[
        list[Path] | None,
        typer.Option(
            "--exported",
            metavar="FILE",
            help="File of `ddfup export`, for export; repeatable.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="WxH",
            help="Guide of network and end-to-end. Default: 640x480, with --quick 128x96.",
            show_default=False,
        ),
    ] = None,
    ratio: Annotated[float, typer.Option("--ratio", min=1, max=32, help="Guide over depth.")] = 8,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Number type.")] = "float32",
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="CPU threads. Default: PyTorch's.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes, few rounds: a check that it runs.")] = False,
    device: DeviceOption = "auto",
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE.json", help="Also write the figures here.", show_default=False),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
    config: ConfigOption = None,
) -> None:
    """Measure speed and memory here: the op, the DDF module, the networks, the whole command, exported files."""
    terminal = ctx.ensure_object(Terminal)
    record: dict[str, Any] = {"out": None if out is None else str(out), "status": "failed", "error": None}
    with reported(record, as_json):
        import json

        from ddfup import writing
        from ddfup.speed import results
        from ddfup.speed.run import Settings, run

        if out is not None:
            writing.refuse_inputs(out, *(exported or ()), *map(Path, _parts(model)))
            writing.check_writable(out)
            writing.refuse_existing(out, overwrite=overwrite)
        settings = Settings(
            parts=tuple(_parts(part)) or (*results.PARTS, *(["export"] if exported else [])),
            models=tuple(_parts(model)),
            exported=tuple(map(str, exported or ())),
            size=read_size("--size", size) if size else (128, 96) if quick else (640, 480),
            ratio=ratio,
            dtype=dtype,
            threads=threads,
            quick=quick,
            device=device,
        )
        rows = []
        with terminal.working("measuring"):
            for row in run(settings):
                rows.append(row)
                terminal.note(f"{row.part}: {row.case}: {row.method} {row.direction}", detail=True)
        record |= {"machine": results.machine(settings.found_device()), "settings": settings.record()}
        record |= {"rows": results.records(rows), "status": "ok"}
        if out is not None:
            writing.write_files({out: (json.dumps(record, indent=1) + "\n").encode()})
        if not as_json:
            for number, (title, head, lines) in enumerate(results.tables(rows)):
                say(("\n" if number else "") + title)
                print_table(head, lines)
        where = record["machine"]
        terminal.note(
            f"{where['device']}, {where['processor']}, {where['cores']} cores, torch {where['torch']}, "
            f"{where['kernels']} kernels"
        )
        if out is not None:
            terminal.note(f"wrote {out}")


def _parts(values: list[str] | None) -> list[str]:
    """Take repeated options and lists with commas (a config file's) alike."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]
