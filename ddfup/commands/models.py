"""`ddfup models`: what weights there are, checked."""

from __future__ import annotations

import typer

from ddfup.errors import DDFUpError
from ddfup.options import (
    DebugOption,
    JsonOption,
    QuietOption,
    VerboseOption,
)
from ddfup.terminal import Terminal, print_json, print_table


def models(
    ctx: typer.Context,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """List the bundled models and check their weights."""
    from ddfup.models import DEFAULT_MODEL, list_models, verify

    terminal = ctx.ensure_object(Terminal)
    failures: list[DDFUpError] = []
    rows: list[tuple[str, ...]] = []
    for info in list_models():
        problem = None
        try:
            verify(info)
        except DDFUpError as error:
            failures.append(error)
            problem = error.message
        if as_json:
            print_json(
                {
                    "name": info.name,
                    "default": info.name == DEFAULT_MODEL,
                    "architecture": info.architecture,
                    "parameters": info.parameters,
                    "path": str(info.path),
                    "sha256": info.sha256,
                    "description": info.description,
                    "status": "failed" if problem else "ok",
                    "error": problem,
                }
            )
        name = info.name + (" (default)" if info.name == DEFAULT_MODEL else "")
        state = "DAMAGED" if problem else "ok"
        size = f"{info.parameters / 1e6:.2f} M"
        rows.append((name, info.architecture, size, info.sha256[:12], state, info.description))
    if not as_json:
        print_table(("model", "architecture", "parameters", "sha256", "weights", "description"), rows)
    if failures:
        raise failures[0]
    if not rows:
        terminal.note("note: no models are bundled")
