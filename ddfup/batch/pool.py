"""The network behind a batch: in one thread of this process, or in one process for each GPU."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ddfup._memory import keep_freed_memory
from ddfup.errors import DDFUpError, DeviceError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from ddfup.inference import Upsampler


class Stopped(Exception):
    """The batch ends before this pair has had its turn."""


@dataclass(frozen=True)
class Answer:
    """What the network gave.

    Attributes:
        depth: (H, W) float32.
        device: Where it was computed.
        kernels: By which kernels.
        seconds: How long the network took.
    """

    depth: NDArray[np.float32]
    device: str
    kernels: str
    seconds: float


class Pool(Protocol):
    """Where pairs have their turn at the network."""

    @property
    def model_name(self) -> str:
        """Name of the model."""

    @property
    def weights_sha256(self) -> str:
        """Hash of the weight file."""

    @property
    def size(self) -> int:
        """Number of pairs that are worked on at once."""

    def infer(self, depth: Any, guide: Any, valid: Any, fill: bool) -> Answer:
        """Wait for a turn, and upsample.

        Raises:
            Stopped: If the pool is stopped first.
            DDFUpError: If this pair cannot be done.
        """

    def stop(self) -> None:
        """Let what is under way end, and begin nothing more."""

    def close(self) -> None:
        """Stop, and wait until all has ended."""

    def abandon(self) -> None:
        """Leave nothing behind when this process ends without `close`; may be called by a signal handler."""


class LocalPool:
    """One network, which always computes in the same thread: PyTorch's own threads belong to the one that asks.

    Args:
        upsampler: The network.
    """

    size = 1

    def __init__(self, upsampler: Upsampler) -> None:
        self._upsampler = upsampler
        self._thread = ThreadPoolExecutor(1, "ddfup-network")
        self.model_name = upsampler.model_name
        self.weights_sha256 = upsampler.weights_sha256

    def infer(self, depth: Any, guide: Any, valid: Any, fill: bool) -> Answer:
        """Wait for a turn, and upsample."""
        try:
            future = self._thread.submit(_timed, self._upsampler, depth, guide, valid, fill)
        except RuntimeError:
            # The executor has been shut down.
            raise Stopped from None
        try:
            return future.result()
        except CancelledError:
            raise Stopped from None

    def stop(self) -> None:
        """Let what is under way end, and begin nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Stop, and wait until all has ended."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def abandon(self) -> None:
        """Do nothing: the thread ends with the process."""


class ProcessPool:
    """One network in a process of its own for each device.

    Args:
        model: Weight file.
        devices: Their names.
        precision: As for `Upsampler`.
        tile: As for `Upsampler`.

    Raises:
        DDFUpError: If a network cannot be loaded.
    """

    def __init__(self, model: str, devices: Sequence[str], precision: str, tile: str | int) -> None:
        import multiprocessing

        context = multiprocessing.get_context("spawn")
        self.size = len(devices)
        self._workers: list[tuple[str, BaseProcess, Connection]] = []
        self._idle: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._stopped = False
        self._alive = self.size
        self._lock = threading.Lock()
        try:
            for device in devices:
                ours, theirs = context.Pipe()
                arguments = (theirs, model, device, precision, tile)
                child = context.Process(target=_serve, args=arguments, daemon=True, name=f"ddfup-{device}")
                child.start()
                theirs.close()
                self._workers.append((device, child, ours))
            for index, (device, process, connection) in enumerate(self._workers):
                try:
                    self.model_name, self.weights_sha256 = _receive(connection)
                except (EOFError, OSError) as error:
                    raise _ended(device, process) from error
                self._idle.put(index)
        except BaseException:
            self.close()
            raise

    def infer(self, depth: Any, guide: Any, valid: Any, fill: bool) -> Answer:
        """Wait for a turn, and upsample."""
        index = self._idle.get()
        if index is None or self._stopped:
            # For the next one who waits.
            self._idle.put(None)
            if self._stopped:
                raise Stopped
            raise DeviceError("no process with a network is left", "is there enough memory?")
        device, process, connection = self._workers[index]
        try:
            connection.send((depth, guide, valid, fill))
            answer: Answer = _receive(connection)
        except (EOFError, OSError) as error:
            with self._lock:
                self._alive -= 1
                if not self._alive:
                    self._idle.put(None)
            raise _ended(device, process) from error
        except Exception:
            self._idle.put(index)
            raise
        self._idle.put(index)
        return answer

    def stop(self) -> None:
        """Let what is under way end, and begin nothing more."""
        self._stopped = True
        # Takes the idle ones away, so that whoever waits gets nothing but the end.
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait()
        self._idle.put(None)

    def close(self) -> None:
        """Stop, and wait until all has ended."""
        self.stop()
        for _, _, connection in self._workers:
            connection.close()
        for _, process, _ in self._workers:
            process.join(10)
            if process.is_alive():
                process.terminate()
                process.join(5)

    def abandon(self) -> None:
        """End the processes, which would else finish what they are at."""
        for _, process, _ in self._workers:
            process.terminate()


def assign_devices(device: str, count: int, *, one_of_many: bool) -> list[str]:
    """Return the devices that get a network each.

    Args:
        device: As for `Upsampler`.
        count: Number of GPUs that this process sees.
        one_of_many: Whether other processes of the same job (torchrun) have GPUs of their own.

    Example:
        >>> assign_devices("auto", 2, one_of_many=False), assign_devices("cuda:1", 2, one_of_many=False)
        (['cuda:0', 'cuda:1'], ['cuda:1'])
    """
    if device in ("auto", "cuda") and count > 1 and not one_of_many:
        return [f"cuda:{index}" for index in range(count)]
    return [device]


def make_pool(model: str, device: str, precision: str, tile: str | int) -> Pool:
    """Load the network: on every GPU if there are several, none is named, and this is not one process of many.

    Raises:
        DDFUpError: If it cannot be loaded.
    """
    import torch

    from ddfup.inference import Upsampler

    devices = assign_devices(device, torch.cuda.device_count(), one_of_many="LOCAL_RANK" in os.environ)
    if len(devices) > 1:
        return ProcessPool(model, devices, precision, tile)
    return LocalPool(Upsampler(model, device=devices[0], precision=precision, tile=tile))


def _timed(upsampler: Upsampler, depth: Any, guide: Any, valid: Any, fill: bool) -> Answer:
    begin = time.perf_counter()
    result = upsampler(depth, guide, valid=valid, fill=fill)
    return Answer(result, upsampler.device, upsampler.kernels, time.perf_counter() - begin)


def _serve(connection: Connection, model: str, device: str, precision: str, tile: str | int) -> None:
    """Load a network and answer requests until the other side hangs up."""
    # Ctrl-C goes to all processes of a terminal; the one that asks decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("ddfup").addHandler(logging.NullHandler())
    from ddfup.inference import Upsampler

    keep_freed_memory()
    try:
        upsampler = Upsampler(model, device=device, precision=precision, tile=tile)
        connection.send((upsampler.model_name, upsampler.weights_sha256))
    except Exception as error:
        connection.send(portable(error))
        return
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            depth, guide, valid, fill = connection.recv()
            try:
                answer: Answer | Exception = _timed(upsampler, depth, guide, valid, fill)
            except Exception as error:
                answer = portable(error)
            connection.send(answer)


def _receive(connection: Connection) -> Any:
    answer = connection.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _ended(device: str, process: BaseProcess) -> DeviceError:
    process.join(5)
    return DeviceError(
        f"{device}: its process must not end before the batch; got exit code {process.exitcode}",
        "is there enough memory?",
    )


def portable(error: Exception) -> Exception:
    """Return an exception that can be sent to another process."""
    # Exceptions of libraries need not survive pickling.
    return error if isinstance(error, DDFUpError) else RuntimeError(f"{type(error).__name__}: {error}")
