"""`ddfup info`: what a file holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ddfup.options import (
    ConfigOption,
    DebugOption,
    InvalidOption,
    JsonOption,
    MaxPixelsOption,
    QuietOption,
    UnitOption,
    VerboseOption,
)
from ddfup.terminal import one_line, reported


def info(
    ctx: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Depth file or picture.", show_default=False, readable=False)
    ],
    unit: UnitOption = None,
    invalid: InvalidOption = "0,nan,inf",
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
        from ddfup import io
        from ddfup.info import describe, lines

        meaning = io.parse_unit(unit) if unit else None
        facts = describe(file, unit=meaning, invalid=io.parse_invalid(invalid), max_pixels=max_pixels)
        record |= {"status": "ok", **facts}
        if not as_json:
            for line in lines(facts, blocks=_blocks()):
                typer.echo(one_line(line))


def _blocks() -> str:
    """Return what stdout can show: eighths of a character, or plain ones."""
    blocks = " ▏▎▍▌▋▊▉█"
    try:
        blocks.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return " #"
    return blocks
