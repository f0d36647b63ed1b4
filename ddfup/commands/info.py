"""`ddfup info`: what a file holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ddfup.errors import InputError
from ddfup.options import (
    ConfigOption,
    DebugOption,
    InvalidOption,
    JsonOption,
    MaxPixelsOption,
    OverwriteOption,
    QuietOption,
    UnitOption,
    VerboseOption,
)
from ddfup.terminal import Terminal, one_line, reported, say


def info(
    ctx: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Depth file or picture.", show_default=False, readable=False)
    ],
    unit: UnitOption = None,
    invalid: InvalidOption = "0,nan,inf",
    raw: Annotated[
        str | None,
        typer.Option(
            "--raw",
            metavar="WIDTHxHEIGHT[:TYPE]",
            help="FILE of unknown suffix has no header but this size; TYPE u8, u16, f16 or f32.",
            show_default=False,
        ),
    ] = None,
    preview: Annotated[
        Path | None,
        typer.Option(
            "--preview", metavar="FILE", help="Write a picture of the depth (.png, .jpg).", show_default=False
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    max_pixels: MaxPixelsOption = 200_000_000,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
    config: ConfigOption = None,
) -> None:
    """Show what a depth file or picture holds: size, type, likely unit, values, holes, metadata."""
    record: dict[str, Any] = {"file": str(file), "status": "failed", "error": None}
    with reported(record, as_json):
        from ddfup import io, writing
        from ddfup.info import describe, draw, lines

        meaning = io.parse_unit(unit) if unit else None
        marks, size = io.parse_invalid(invalid), io.parse_size(raw) if raw else None
        if preview is not None:
            _check_preview(preview, file, overwrite)
        facts = describe(file, unit=meaning, invalid=marks, max_pixels=max_pixels, raw=size)
        if preview is not None:
            if facts["kind"] != "depth":
                raise InputError(f"{file}: --preview must have depth to show; this is a picture already")
            picture = draw(file, facts, invalid=marks, max_pixels=max_pixels, raw=size)
            writing.write_files({preview: writing.encode_image(preview, picture)})
        record |= {"status": "ok", **facts}
        if not as_json:
            for line in lines(facts, blocks=_blocks()):
                say(one_line(line))
        if preview is not None:
            ctx.ensure_object(Terminal).note(f"wrote {preview}")


def _check_preview(preview: Path, file: Path, overwrite: bool) -> None:
    from ddfup import writing

    writing.check_image_suffix(preview)
    writing.refuse_inputs(preview, file)
    writing.check_writable(preview)
    writing.refuse_existing(preview, overwrite=overwrite)


def _blocks() -> str:
    """Return what stdout can show: eighths of a character, or plain ones."""
    blocks = " ▏▎▍▌▋▊▉█"
    try:
        blocks.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return " #"
    return blocks
