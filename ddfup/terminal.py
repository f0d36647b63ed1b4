"""How the commands speak: data to stdout, everything else to stderr. Nothing else prints, but cli.py.

Data that cannot be delivered is an error, as it would be with a file; what is said on stderr is lost in silence.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import typer

from ddfup._stderr import SPEAKING
from ddfup.errors import DDFUpError, OutputError

# Seconds between the lines that stand for a progress bar where nobody watches it move.
_LINE_SECONDS = 30.0
# What a program ends with that SIGPIPE ends: 128 + 13, also on systems that have no such signal.
CLOSED_PIPE = 141
# Where data goes while `data_only` keeps others off stdout.
_data: TextIO | None = None


@dataclass
class Terminal:
    """How much is said on stderr in this call.

    Attributes:
        quiet: Errors only.
        verbose: Details too.
        debug: Tracebacks with errors.
    """

    quiet: bool = False
    verbose: bool = False
    debug: bool = False

    def note(self, text: str, *, detail: bool = False) -> None:
        """Write a line to stderr unless the user asked for less."""
        if not self.quiet and (self.verbose or not detail):
            with SPEAKING, contextlib.suppress(OSError):
                typer.echo(one_line(text), err=True)

    def fail(self, message: str, hint: str = "") -> None:
        """Write the error and hint lines of the exception that is being handled."""
        with SPEAKING, contextlib.suppress(OSError):
            if self.debug:
                typer.echo(traceback.format_exc(), err=True, nl=False)
            typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
            typer.echo(one_line(message), err=True)
            if hint:
                typer.secho("hint: ", fg="cyan", nl=False, err=True)
                typer.echo(one_line(hint), err=True)

    @contextlib.contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Show a spinner on an interactive stderr."""
        if self.quiet or not _is_screen(sys.stderr):
            yield
            return
        from rich.console import Console

        with Console(stderr=True).status(text):
            yield

    @contextlib.contextmanager
    def progress(self, total: int, *, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        """Show how far long work has come: a bar on an interactive stderr, else a line now and then.

        Args:
            total: Steps of the whole work.
            done: Steps done before.

        Yields:
            A function to call with the number of steps done and a few words.
        """
        if self.quiet:
            yield lambda step, text: None
        elif _is_screen(sys.stderr):
            from rich import progress
            from rich.console import Console

            columns = (
                progress.BarColumn(20),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(elapsed_when_finished=True),
                progress.TextColumn("{task.description}", markup=False),
            )
            # Data in a pipe must not be drawn with the bar; on the same screen both share it.
            redirect = _is_screen(sys.stdout)
            with progress.Progress(*columns, console=Console(stderr=True), redirect_stdout=redirect) as bar:
                task = bar.add_task("", total=total, completed=done)
                yield lambda step, text: bar.update(task, completed=step, description=text)
        else:
            begin = last = time.monotonic()

            def report(step: int, text: str) -> None:
                nonlocal last
                now = time.monotonic()
                if now - last >= _LINE_SECONDS:
                    last = now
                    left = (total - step) * (now - begin) / max(1, step - done)
                    self.note(f"{step}/{total}, {left / 60:.0f} min left, {text}")

            yield report


class NoteHandler(logging.Handler):
    """Shows the library's log records as notes."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.INFO)
        self.terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as one line."""
        self.terminal.note(f"note: {record.getMessage()}", detail=record.levelno < logging.WARNING)


def one_line(text: str) -> str:
    """Escape what would break the line or the terminal (file names may hold anything)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(data: str | bytes) -> None:
    """Write a line of text, or bytes as they are, to stdout. All data goes this way.

    Raises:
        OutputError: If it cannot be written.
        SystemExit: If nobody reads it any more, which is no failure to speak of.
    """
    data_stream()
    try:
        typer.echo(data, file=_data, nl=isinstance(data, str))
    except OSError as error:
        raise _lost(error) from error


def data_stream() -> TextIO:
    """Return where data goes.

    Raises:
        OutputError: If it was closed before the program began.
    """
    stream = _data or sys.stdout
    if stream is None:
        raise OutputError("stdout must take the output; it is closed", "let it go to a file or a pipe")
    return stream


def _lost(error: OSError) -> OutputError | SystemExit:
    """Return what to raise when stdout does not take data."""
    if isinstance(error, BrokenPipeError):
        return SystemExit(CLOSED_PIPE)
    return OutputError(
        f"stdout must take the output; got {error.strerror or error}", "free some space, or choose another place for it"
    )


def blame_stdout(error: OSError) -> None:
    """Raise what `say` would if the error is stdout's: from printing, as what is said on stderr may be lost."""
    if any(frame.f_code is typer.echo.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
        raise _lost(error) from error


def settle() -> None:
    """Forget what stdout and stderr did not take: Python would try again at its end, and fail in a way of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def hold_places() -> None:
    """Fill the places of standard streams that are closed: a file that got one would get a library's messages too."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _is_screen(stream: TextIO | None) -> bool:
    # Python has None for a stream that is closed.
    return stream is not None and stream.isatty()


def print_json(record: dict[str, Any]) -> None:
    """Print one JSON object as one line of stdout."""
    say(json.dumps(record))


@contextlib.contextmanager
def data_only(terminal: Terminal) -> Iterator[None]:
    """Keep off stdout what a library prints there in threads of its own; with ``-v`` it goes to stderr."""
    global _data
    with contextlib.ExitStack() as stack:
        sink = sys.stderr if terminal.verbose else stack.enter_context(Path(os.devnull).open("w"))
        _data = sys.stdout
        try:
            with contextlib.redirect_stdout(sink):
                yield
        finally:
            _data = None


@contextlib.contextmanager
def reported(record: dict[str, Any], as_json: bool) -> Iterator[None]:
    """Print the JSON object of a piece of work at its end, whatever happens; with ``as_json`` only."""
    try:
        yield
    except BaseException as error:
        message = error.message if isinstance(error, DDFUpError) else f"{type(error).__name__}: {error}"
        if isinstance(error, KeyboardInterrupt | SystemExit):
            message = "interrupted"
        record |= {"status": "failed", "error": message}
        if as_json:
            # What went wrong first is what is told.
            with contextlib.suppress(OutputError, SystemExit):
                print_json(record)
        raise
    if as_json:
        print_json(record)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns, numbers to the right."""
    numeric = re.compile(r"[0-9.,]+ ?[A-Za-z%]?")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    right = [bool(rows) and all(numeric.fullmatch(row[i]) for row in rows) for i in range(len(head))]
    for row in [head, *rows]:
        cells = (
            text.rjust(width) if r else text.ljust(width) for text, width, r in zip(row, widths, right, strict=True)
        )
        say("  ".join(cells).rstrip())
