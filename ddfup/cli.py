"""The command line: puts the commands together, and turns what they raise into exit codes.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Annotated, cast

import typer

from ddfup import __version__
from ddfup._memory import keep_freed_memory
from ddfup.commands.batch import batch
from ddfup.commands.bench import bench
from ddfup.commands.benchmark import benchmark
from ddfup.commands.demo import demo
from ddfup.commands.doctor import doctor
from ddfup.commands.export import export
from ddfup.commands.info import info
from ddfup.commands.models import models
from ddfup.commands.report import report
from ddfup.commands.train import train
from ddfup.commands.upsample import upsample
from ddfup.errors import DDFUpError, DeviceError
from ddfup.terminal import NoteHandler, Terminal, blame_stdout, hold_places, say, settle

# Exit codes of SIGINT and SIGTERM.
_INTERRUPTED = (130, 143)
# What typer raises for wrong usage; it has no public name of its own in all supported versions.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)

app = typer.Typer(
    help="Guided depth upsampling: low-resolution depth + photo -> sharp high-resolution depth.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        say(f"ddfup {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Guided depth upsampling: low-resolution depth + photo -> sharp high-resolution depth."""


for _command in (upsample, batch, info, demo, models, doctor, train, benchmark, bench, report, export):
    app.command()(_command)


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
        Exit code: 0 done, 1 internal error, 2 usage, 3 done but for some, 4 bad input, 5 nothing makes a pair,
        6 output, 7 weights, 8 device or memory, 130 and 143 interrupted, 141 nobody reads the output any more.
    """
    hold_places()
    keep_freed_memory()
    terminal = Terminal()
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    with contextlib.ExitStack() as stack:
        stack.callback(settle)
        stack.enter_context(_listening(terminal))
        code = _call(arguments, terminal)
        if code in _INTERRUPTED:
            terminal.note("interrupted")
    return code


def _call(arguments: Sequence[str], terminal: Terminal) -> int:
    """Run the command line, say what went wrong, and return the exit code."""
    try:
        return _run(arguments, terminal)
    except DDFUpError as error:
        terminal.fail(error.message, error.hint)
        return error.exit_code
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "ddfup"
        dashes = "; put -- before file names that begin with -" if "No such option" in error.message else ""
        terminal.fail(error.format_message(), f"{command} --help lists what there is{dashes}")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except MemoryError:
        terminal.fail("memory must hold the work; it ran out", "use smaller tiles: --tile 512")
        return DeviceError.exit_code
    except Exception as error:
        terminal.fail(f"internal error: {type(error).__name__}: {error}", "please report it, with --debug")
        return 1


def _run(arguments: Sequence[str], terminal: Terminal) -> int:
    """Run the command line; a stdout that does not take its output ends every command in the same way."""
    streams = sys.stdout, sys.stderr
    try:
        code = app(arguments, prog_name="ddfup", standalone_mode=False, obj=terminal)
    except (OSError, SystemExit) as error:
        # typer prints too, help for one, and answers a closed pipe by other streams and an exit code of its own.
        sys.stdout, sys.stderr = streams
        cause = error.__context__ if isinstance(error, SystemExit) else error
        if isinstance(cause, OSError):
            blame_stdout(cause)
        raise
    return code if isinstance(code, int) else 0
