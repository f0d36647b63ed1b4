"""Checkpoints of a training run: written whole or not at all, and read for the same configuration only."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ddfup.errors import InputError
from ddfup.training.config import TrainingConfig
from ddfup.writing import write_files

# What a resumed run may change: nothing of it reaches the weights.
_FREE_KEYS = frozenset(
    {"model.description", "data.tune_frames", "optimization.checkpoint_minutes", "optimization.tune_every"}
)


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint.

    Args:
        path: The file.
        state: What :func:`read` returns.

    Raises:
        OutputError: If that fails; an older checkpoint stays.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_files({path: buffer.getvalue()})


def read(path: Path, device: torch.device, config: TrainingConfig, processes: int) -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: The file.
        device: Where its tensors are to be.
        config: That of the run that is to go on.
        processes: How many train together.

    Raises:
        InputError: If it cannot be read, or is that of a run with another configuration.
    """
    with naming_damage(path):
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        # Old checkpoints do not tell.
        differences: list[tuple[str, Any, Any]] = []
        if "config" in state:
            differences += _differences(state["config"], config)
            differences += _differences(state["processes"], processes, "processes")
    for key, old, new in differences:
        if key not in _FREE_KEYS:
            raise InputError(
                f"{path}: cannot be resumed: {key} must be {old!r} as when the run began; got {new!r}",
                "resume with the old value, or begin a run with another --out, from these weights with --init",
            )
    return state


@contextlib.contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Tell of whatever goes wrong with a checkpoint's content as a fault of the file."""
    try:
        yield
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, UnpicklingError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path}: cannot be resumed: {first}", "the file is damaged, or belongs to another configuration"
        ) from error


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs between a configuration as a checkpoint holds it and one of now.

    Options that only one of them has are not compared: a run goes on after an update of ddfup.

    Yields:
        Key, old and new value.
    """
    parts: list[tuple[str, Any, Any]]
    if dataclasses.is_dataclass(new) and isinstance(old, Mapping):
        names = [field.name for field in dataclasses.fields(new) if field.name in old]
        parts = [(f"{key}.{name}".lstrip("."), old[name], getattr(new, name)) for name in names]
    elif isinstance(new, Mapping) and isinstance(old, Mapping):
        parts = [(f"{key}.{name}", old.get(name), new.get(name)) for name in {**old, **new}]
    elif isinstance(new, list | tuple) and isinstance(old, list | tuple):
        parts = [(f"{key}[{index}]", *pair) for index, pair in enumerate(zip_longest(old, new))]
    else:
        if old != new:
            yield key, old, new
        return
    for name, before, now in parts:
        yield from _differences(before, now, name)
