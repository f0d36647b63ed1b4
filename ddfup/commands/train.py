"""``ddfup train``: a training run from the command line, alone or as one process of ``torchrun``."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddfup.configs import bundled_configs
from ddfup.options import DebugOption, DeviceOption, JsonOption, QuietOption, VerboseOption
from ddfup.signals import handled
from ddfup.terminal import Terminal, reported

if TYPE_CHECKING:
    from ddfup.training.trainer import Progress, Trainer

# Between two readings of the loss for the screen.
_WORDS_SECONDS = 0.5


def train(
    ctx: typer.Context,
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help=f"A TOML file, or a bundled configuration: {', '.join(bundled_configs())}.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Folder that holds the configuration's data sets.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            metavar="DIR",
            help="Folder of the run: checkpoint, log, weights.",
            show_default=False,
        ),
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out exactly.")] = False,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="NAME|PATH",
            help="Start from a trained model of the same sizes.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "auto",
    max_minutes: Annotated[
        float | None,
        typer.Option("--max-minutes", min=0.0, help="Stop after this time, to --resume.", show_default=False),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=0, max=256, help="Processes that prepare samples.")] = 1,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a network; ctrl-C keeps what is learned.

    Many GPUs: torchrun --nproc-per-node=N -m ddfup train ...
    """
    terminal = ctx.ensure_object(Terminal)
    if int(os.environ.get("RANK", "0")) > 0:
        # Every process does the same; one of them tells.
        terminal.quiet, as_json = True, False
    record: dict[str, Any] = {"out": str(out), "weights": None, "status": "failed", "error": None}
    record |= {"step": None, "steps": None, "loss": None, "tune": None, "device": None, "seconds": None}
    with reported(record, as_json):
        from ddfup.training.config import load_config

        settings = load_config(config)
        with terminal.working("loading the training data"):
            from ddfup.training.trainer import Trainer

            trainer = Trainer(settings, data, out, device=device, resume=resume, workers=workers, init=init)
        steps = settings.optimization.steps
        terminal.note(
            f"training {settings.model.name} on {trainer.device}: step {trainer.step} of {steps}"
            + (f", {trainer.world} processes" if trainer.world > 1 else "")
        )
        start = time.monotonic()
        with trainer, terminal.progress(steps, done=trainer.step) as show, _stopping(trainer) as caught:
            limit = math.inf if max_minutes is None else max_minutes
            complete = trainer.run(max_minutes=limit, on_step=_teller(show))
        record |= {
            "weights": str(trainer.weights),
            "status": "ok" if complete else "stopped",
            "step": trainer.step,
            "steps": steps,
            "loss": None if math.isnan(trainer.loss) else trainer.loss,
            "tune": trainer.tune,
            "device": str(trainer.device),
            "seconds": time.monotonic() - start,
        }
        terminal.note(f"wrote {trainer.weights} at step {trainer.step} of {steps}")
        if not complete:
            terminal.note("stopped early: --resume continues")
    if caught and not complete:
        raise typer.Exit(128 + caught[0])


def _teller(show: Callable[[int, str], None]) -> Callable[[Progress], None]:
    """Return what shows each step; the words are renewed now and then, as reading the loss waits for a GPU."""
    read, words = -math.inf, ""

    def tell(progress: Progress) -> None:
        nonlocal read, words
        if time.monotonic() - read >= _WORDS_SECONDS:
            words = _words(progress)
            read = time.monotonic()
        show(progress.step, words)

    return tell


def _words(progress: Progress) -> str:
    tune = ", ".join(f"{name} {error:.2f} cm" for name, error in progress.tune.items())
    return f"loss {progress.loss:.3f}" + (f"; {tune}" if tune else "")


@contextlib.contextmanager
def _stopping(trainer: Trainer) -> Iterator[list[int]]:
    """Let the first SIGINT or SIGTERM end the run after its step; a second one acts at once.

    Yields:
        The signals that came.
    """
    caught: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        trainer.stop()

    with handled(stop, once=True):
        yield caught
