"""What runs in a Ray worker: one network, and a few pairs at once around it. Knows nothing of Ray itself."""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from ddfup import __version__
from ddfup._memory import keep_freed_memory
from ddfup.batch.journal import open_journal
from ddfup.batch.outputs import open_outputs
from ddfup.batch.pairing import Pair
from ddfup.batch.pool import Pool, Stopped, make_pool, portable
from ddfup.batch.processing import Outcome, Processor, Settings
from ddfup.errors import DDFUpError, DeviceError, InputError


@dataclass(frozen=True)
class Job:
    """What a worker has to know.

    Attributes:
        version: Version of ddfup that sends the job.
        settings: What to do.
        device: Where the network computes.
        precision: As for `Upsampler`.
        tile: As for `Upsampler`.
        mark: The output folder's own; see `Outputs.mark`.
        folder: Folder that relative paths start from.
        local: Whether there are local paths at all.
        kernels: DDFUP_KERNELS of the sender, if set.
    """

    version: str
    settings: Settings
    device: str
    precision: str
    tile: str | int
    mark: str
    folder: Path
    local: bool
    kernels: str | None


class Worker:
    """A worker of a batch.

    Args:
        job: What to do.
        weights: Content of the weight file, which only the sender's machine need have.
    """

    def __init__(self, job: Job, weights: bytes) -> None:
        keep_freed_memory()
        self._job = job
        self._weights = weights
        # Nothing more is begun; nothing more is written, either.
        self._stop = threading.Event()
        self._drop = threading.Event()
        self._loading = threading.Lock()
        self._pool: Pool | None = None
        self._problem: DDFUpError | None = None
        try:
            self._processor = self._begin()
        except DDFUpError as error:
            self._problem = error

    def check(self) -> tuple[int, DDFUpError | None]:
        """Return the process's number, and why the worker cannot work, if so."""
        return os.getpid(), self._problem

    def process(self, work: Pair) -> Outcome | None:
        """Do one pair; several threads may call this at once.

        Returns:
            What became of it, failures included; None: another process has it, or the batch ends.
        """
        try:
            outcome = self._processor.process(work)
        except Stopped:
            return None
        if outcome is not None and outcome.failure is not None:
            outcome.failure = portable(outcome.failure)
        return outcome

    def stop(self, *, drop: bool = False) -> None:
        """Let what is under way end, and begin nothing more.

        Args:
            drop: Whether what is under way is not to be written any more.
        """
        if drop:
            self._drop.set()
        self._stop.set()
        if self._pool is not None:
            self._pool.stop()

    # --- the network, as the processor asks for it ---

    def want(self) -> None:
        """Wait for `get`: a thread of its own to load would gain nothing here."""

    def get(self) -> Pool:
        """Load the network, the first time.

        Raises:
            Stopped: If the batch ends.
            DDFUpError: If it cannot be loaded.
        """
        with self._loading:
            if self._stop.is_set():
                raise Stopped
            if self._pool is None:
                with tempfile.TemporaryDirectory(prefix="ddfup-") as folder:
                    path = Path(folder, "model.safetensors")
                    path.write_bytes(self._weights)
                    self._pool = make_pool(str(path), self._job.device, self._job.precision, self._job.tile)
            return self._pool

    def _begin(self) -> Processor:
        job = self._job
        if job.version != __version__:
            raise DeviceError(
                f"ddfup must be the same on all machines of the cluster; got {job.version} and {__version__}",
                "install the same version everywhere",
            )
        if job.kernels is not None:
            os.environ["DDFUP_KERNELS"] = job.kernels
        # Of torchrun, which may have started this batch: the worker's only GPU is its first one.
        os.environ.pop("LOCAL_RANK", None)
        if job.local:
            try:
                os.chdir(job.folder)
            except OSError as error:
                raise InputError(
                    f"{job.folder}: must be there on all machines of the cluster; got {error.strerror or error}",
                    "use a folder that they share, or an object store",
                ) from error
        settings = job.settings
        journal = open_journal(settings.out_dir)
        outputs = open_outputs(settings.out_dir, settings.preview_dir, journal, overwrite=settings.overwrite)
        return Processor(settings, outputs, journal, outputs.join(job.mark), self, self._drop.is_set)
