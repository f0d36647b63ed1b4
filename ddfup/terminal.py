"""How the commands speak: data to stdout, everything else to stderr. Nothing else prints, but cli.py."""

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
from ddfup.errors import DDFUpError

# Seconds between the lines that stand for a progress bar where nobody watches it move.
_LINE_SECONDS = 30.0
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
            with SPEAKING:
                typer.echo(one_line(text), err=True)

    def fail(self, message: str, hint: str = "") -> None:
        """Write the error and hint lines of the exception that is being handled."""
        with SPEAKING:
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
        if self.quiet or not sys.stderr.isatty():
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
        elif sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                progress.BarColumn(20),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(elapsed_when_finished=True),
                progress.TextColumn("{task.description}", markup=False),
            )
            # Data in a pipe must not be drawn with the bar; on the same screen both share it.
            redirect = sys.stdout.isatty()
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


def print_json(record: dict[str, Any]) -> None:
    """Print one JSON object as one line of stdout."""
    typer.echo(json.dumps(record), file=_data)


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
        raise
    finally:
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
        typer.echo("  ".join(cells).rstrip())
