"""The command line: commands, exit codes. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ddfup import __version__
from ddfup.commands_train import train
from ddfup.errors import ArgumentError, DDFUpError, DeviceError, KernelBuildError, OutputError
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
    ModelOption,
    OutOption,
    OverwriteOption,
    PrecisionOption,
    PreviewOption,
    QuietOption,
    SkipOption,
    TileOption,
    UnitOption,
    VerboseOption,
    one_of,
)
from ddfup.terminal import NoteHandler, Terminal, one_line, print_json, print_table, reported

if TYPE_CHECKING:
    from ddfup.inference import Upsampler

# What typer raises for wrong usage; it has no public name of its own in all supported versions.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)

app = typer.Typer(
    help="Guided depth upsampling: low-resolution depth + photo -> sharp high-resolution depth.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"ddfup {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Guided depth upsampling: low-resolution depth + photo -> sharp high-resolution depth."""


def _upsampler(model: str | None, device: str, precision: str, tile: str) -> Upsampler:
    from ddfup.inference import Upsampler
    from ddfup.models import DEFAULT_MODEL

    return Upsampler(
        model or DEFAULT_MODEL, device=device, precision=precision, tile=int(tile) if tile.isdigit() else tile
    )


# --- commands ---


@app.command()
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
    fill: FillOption = False,
    format: FormatOption = None,
    preview: PreviewOption = None,
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

        overwrite, skip_existing = one_of(ctx, overwrite=overwrite, skip_existing=skip_existing)
        if out == "-" and as_json:
            raise ArgumentError("--json and -o - must not share stdout", "give -o a file name")
        if out == "-" and sys.stdout.isatty():
            raise ArgumentError("-o - must go to a file or pipe; stdout is a terminal", "ddfup upsample ... -o - > x")
        options = pair.Options(
            unit=io.parse_unit(unit) if unit else None,
            invalid=io.parse_invalid(invalid),
            format=format,
            preview=preview,
            overwrite=overwrite,
            skip_existing=skip_existing,
            fill=fill,
            max_pixels=max_pixels,
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
            upsampler = _upsampler(model, device, precision, tile)
        with terminal.working(f"upsampling to {size}"):
            result = pair.run(work, inputs, upsampler, options)
        record |= {"model": upsampler.model_name, "device": upsampler.device, "kernels": upsampler.kernels}
        if work.out is None:
            _write_stdout(result.data)
        record |= {"seconds": result.seconds, "valid_fraction": result.valid_fraction, "status": "ok"}
        for note in result.notes:
            terminal.note(f"note: {note}")
        terminal.note(
            f"wrote {target}: {size}, {result.valid_fraction:.1%} valid, {upsampler.model_name} on "
            f"{upsampler.device} ({upsampler.kernels} kernels), {result.seconds:.2f} s"
        )


def _write_stdout(data: bytes) -> None:
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        raise OutputError(f"stdout must take {len(data)} bytes; got {error.strerror or error}") from error


@app.command()
def demo(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for the files.")] = Path("ddfup-demo"),
    model: ModelOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    tile: TileOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
    config: ConfigOption = None,
) -> None:
    """Upsample a bundled scene eight-fold and compare with plain interpolation."""
    terminal = ctx.ensure_object(Terminal)
    from ddfup import demo as scene

    scene.check_folder(out)
    with terminal.working("loading the model"):
        upsampler = _upsampler(model, device, precision, tile)
    with terminal.working("upsampling the demo scene"):
        outcome = scene.run(out, upsampler)
    if as_json:
        print_json(
            {
                "out": str(out),
                "files": [str(path) for path in outcome.files],
                "factor": scene.FACTOR,
                "width": outcome.width,
                "height": outcome.height,
                "model": upsampler.model_name,
                "device": upsampler.device,
                "kernels": upsampler.kernels,
                "seconds": outcome.seconds,
                "rmse_mm": outcome.rmse_mm,
            }
        )
        return
    best = outcome.rmse_mm["bicubic"]
    print_table(
        ("method", "RMSE (mm)", "of bicubic"),
        [(name, f"{value:.1f}", f"{value / best:.0%}") for name, value in outcome.rmse_mm.items()],
    )
    terminal.note(
        f"x{scene.FACTOR} to {outcome.width}x{outcome.height} in {outcome.seconds:.2f} s "
        f"on {upsampler.device} ({upsampler.kernels} kernels)"
    )
    terminal.note(f"wrote {', '.join(path.name for path in outcome.files)} to {out}")


@app.command()
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


@app.command()
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
        typer.echo(json.dumps(facts | {"kernels": dataclasses.asdict(status)}, default=str))
    else:
        for name, value in facts.items():
            typer.echo(f"{name:<10} {(', '.join(value) or 'none') if isinstance(value, list) else value}")
        typer.echo(f"{'kernels':<10} DDFUP_KERNELS={status.mode}, cache {status.cache}")
        for kernels in (status.cpu, status.cuda):
            state = "native" if kernels.available else "PyTorch"
            typer.echo(f"  {kernels.device:<8} {state}: {one_line(kernels.reason)}")
            if verbose:
                typer.echo(f"{'':<10} library {kernels.library}, compiler {kernels.compiler}")
            if kernels.hint:
                typer.echo(f"{'':<10} hint: {one_line(kernels.hint)}")
    if build and status.mode != "torch" and not status.cpu.loaded:
        problem = KernelBuildError(status.cpu.reason, status.cpu.hint)
    if problem is not None:
        raise problem


app.command()(train)


# --- entry ---


def _terminate(signum: int, frame: FrameType | None) -> None:
    # An exception, so that temporary files are removed on the way out.
    raise SystemExit(128 + signum)


@contextlib.contextmanager
def _listening(terminal: Terminal) -> Iterator[None]:
    """Take SIGTERM and the library's log for the length of one call."""
    log, handler = logging.getLogger("ddfup"), NoteHandler(terminal)
    log.addHandler(handler)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        log.removeHandler(handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        Exit code: 0 done, 1 internal error, 2 usage, 4 bad input, 6 output, 7 weights, 8 device or memory,
        130 and 143 interrupted.
    """
    terminal = Terminal()
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    with _listening(terminal):
        try:
            code = app(arguments, prog_name="ddfup", standalone_mode=False, obj=terminal)
        except DDFUpError as error:
            terminal.fail(error.message, error.hint)
            return error.exit_code
        except _UsageError as error:
            command = error.ctx.command_path if error.ctx else "ddfup"
            dashes = "; put -- before file names that begin with -" if "No such option" in error.message else ""
            terminal.fail(error.format_message(), f"{command} --help lists what there is{dashes}")
            return 2
        except (KeyboardInterrupt, typer.Abort):
            terminal.note("interrupted")
            return 130
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 1
        except MemoryError:
            terminal.fail("memory must hold the work; it ran out", "use smaller tiles: --tile 512")
            return DeviceError.exit_code
        except Exception as error:
            terminal.fail(f"internal error: {type(error).__name__}: {error}", "please report it, with --debug")
            return 1
    return code if isinstance(code, int) else 0
