"""`ddfup doctor`: what runs on this machine, and why."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ddfup import __version__
from ddfup.errors import DDFUpError, KernelBuildError
from ddfup.options import (
    DebugOption,
    JsonOption,
    QuietOption,
    VerboseOption,
)
from ddfup.terminal import Terminal, one_line, say


def doctor(
    ctx: typer.Context,
    build: Annotated[bool, typer.Option("--build", help="Build the native kernels now, anew.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what runs on this machine, and why."""
    import dataclasses
    import platform

    import torch

    from ddfup.io import FORMATS
    from ddfup.models import list_models
    from ddfup.ops import native

    terminal = ctx.ensure_object(Terminal)
    if build:
        with terminal.working("building the native kernels"):
            status = native.build(force=True)
    else:
        status = native.status()
    facts: dict[str, Any] = {
        "ddfup": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "formats": list(FORMATS),
    }
    problem: DDFUpError | None = None
    try:
        facts["models"] = [info.name for info in list_models()]
    except DDFUpError as error:
        facts["models"], problem = [], error
    if as_json:
        say(json.dumps(facts | {"kernels": dataclasses.asdict(status)}, default=str))
    else:
        for name, value in facts.items():
            say(f"{name:<10} {(', '.join(value) or 'none') if isinstance(value, list) else value}")
        say(f"{'kernels':<10} DDFUP_KERNELS={status.mode}, cache {status.cache}")
        for kernels in (status.cpu, status.cuda):
            state = "native" if kernels.available else "PyTorch"
            say(f"  {kernels.device:<8} {state}: {one_line(kernels.reason)}")
            if verbose:
                say(f"{'':<10} library {kernels.library}, compiler {kernels.compiler}")
            if kernels.hint:
                say(f"{'':<10} hint: {one_line(kernels.hint)}")
    if build and status.mode != "torch":
        for kernels in (status.cpu, status.cuda):
            if kernels.failed:
                problem = KernelBuildError(f"{kernels.device}: {kernels.reason}", kernels.hint)
                break
    if problem is not None:
        raise problem
