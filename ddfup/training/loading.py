"""Batches made by processes beside the one that trains."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence

import cv2
import torch
from torch.utils.data import DataLoader

from ddfup.errors import DDFUpError
from ddfup.training.data import Batch, ErrorsAsValues, StepBatches, batch_of


def load_batches(batches: StepBatches, steps: Sequence[int], *, workers: int, device: torch.device) -> Iterator[Batch]:
    """Make the batches of steps, some of them ahead.

    Args:
        batches: What makes them.
        steps: Their numbers, in order.
        workers: Processes; 0: this one.
        device: Where they will be copied to.

    Raises:
        InputError: If the data give no samples.
    """
    loader: DataLoader[Batch | DDFUpError] = DataLoader(
        ErrorsAsValues(batches),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=8 if workers else None,
        worker_init_fn=_leave_signals_to_parent,
    )
    with _one_thread():
        items = iter(loader)
    return map(batch_of, items)


def is_loaders_end(error: BaseException) -> bool:
    """Tell whether an error says that a process of the loader has ended."""
    told = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
    return told or isinstance(error, ConnectionError | EOFError)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep OpenCV from having as many threads as there are cores in each of the processes that are made meanwhile.

    Asked in such a process itself, it would wait for the threads of its parent for ever.
    """
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _leave_signals_to_parent(worker: int) -> None:
    """Keep loader processes alive through ctrl-C, which reaches them too: the parent ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
