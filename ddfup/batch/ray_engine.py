"""A batch on a Ray cluster: hands pairs to workers, and theirs to others when a worker dies.

Ray's core and not Ray Data: there one exception ends the job, and its checkpoints are not ours. A failure is caught
where it happens and comes back as an outcome; what is done stands in the journal of the output folder.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddfup import __version__
from ddfup.batch.engine import PAIRS_PER_NETWORK, PATIENCE
from ddfup.batch.journal import Journal
from ddfup.batch.outputs import open_outputs
from ddfup.batch.pairing import Pair
from ddfup.batch.processing import Outcome, Settings
from ddfup.batch.ray_worker import Job, Worker
from ddfup.errors import ArgumentError, DDFUpError, DeviceError
from ddfup.signals import REQUESTS

_logger = logging.getLogger(__name__)

# Seconds between two looks at signals and at the cluster.
_TICK = 0.2
_LOOK = 5.0
# Seconds without any worker after which the user hears of it.
_NOTE = 5.0
# How often a worker may die with one pair alone, or in a row before it has begun.
_DEATHS = 2
_STILLBORN = 3
# Seconds for a machine to answer at an address.
_ANSWER = 5.0


@dataclass(frozen=True)
class Plan:
    """How a batch runs on the cluster.

    Attributes:
        model: Weight file.
        device: "auto", "cpu" or "cuda": whether workers get a GPU each.
        precision: As for `Upsampler`.
        tile: As for `Upsampler`.
        wait: Seconds to wait for the cluster's first worker.
    """

    model: Path
    device: str = "auto"
    precision: str = "auto"
    tile: str | int = "auto"
    wait: float = 120.0


@dataclass
class _Slot:
    """A worker, and the pairs it has."""

    actor: Any
    starting: Any | None
    pairs: dict[Any, Pair] = field(default_factory=dict)
    alone: bool = False


class RayBatch:
    """Pairs to be done on a Ray cluster; like `engine.Batch` to its caller.

    Args:
        pairs: The pairs; no two have the same output.
        settings: What to do.
        journal: The journal of the output folder.
        plan: How.

    Attributes:
        loading: Whether the cluster is being started or connected to.

    Raises:
        ArgumentError: If Ray is not installed, or the device is one GPU of this machine.
    """

    def __init__(self, pairs: Sequence[Pair], settings: Settings, journal: Journal, plan: Plan) -> None:
        if plan.device not in ("auto", "cpu", "cuda"):
            raise ArgumentError(
                f"--device must be auto, cpu or cuda with --engine ray; got {plan.device!r}",
                "the cluster says which GPU a worker gets",
            )
        self._ray = _import_ray()
        self._pairs = pairs
        self._settings = settings
        self._outputs = open_outputs(settings.out_dir, settings.preview_dir, journal, overwrite=settings.overwrite)
        self._plan = plan
        self._todo: collections.deque[tuple[float, Pair]] = collections.deque((0.0, pair) for pair in pairs)
        # Pairs that a worker died with: each has a worker for itself next time, so that others do not suffer.
        self._suspects: collections.deque[Pair] = collections.deque()
        self._deaths: collections.Counter[str] = collections.Counter()
        self._slots: list[_Slot] = []
        self._stillborn = 0
        self._wanted = 0
        self._looked = self._without = -1.0
        self._noted = False
        self._stopping = self._dropping = self._abandoned = False
        self.loading = False

    def check(self, among: Sequence[Pair]) -> None:
        """Refuse, before any work, outputs that would replace what they must not.

        Args:
            among: All pairs there are, of which these may be a part.

        Raises:
            OutputError: If an output is an input of any pair, or, unasked, a file that no batch has made.
        """
        self._outputs.check_all(self._pairs, among=among, keep=self._settings.skip_existing)

    def stop(self) -> None:
        """End after what the workers are at, which is finished; may be called by a signal handler."""
        self._stopping = True

    def abandon(self) -> None:
        """Tidy nothing but the cluster when `results` ends; for a signal handler that raises."""
        self._abandoned = True

    def results(self) -> Generator[Outcome, None, None]:
        """Do the work.

        Yields:
            What became of each pair, in the order in which they end; after `stop`, those that were under way.

        Raises:
            DDFUpError: If nothing more can be done: no cluster or no place on it, no network, or the disk is full.
        """
        claims = self._outputs.open(self._pairs)
        try:
            with contextlib.ExitStack() as stack:
                self.loading = True
                try:
                    stack.enter_context(_connected(self._ray, self._settings.workers))
                    self._prepare(self._outputs.mark(claims))
                finally:
                    self.loading = False
                stack.callback(self._dismiss)
                yield from self._run()
        finally:
            if not self._abandoned:
                self._outputs.close(self._pairs, claims)

    def _run(self) -> Iterator[Outcome]:
        fatal: DDFUpError | None = None
        told: bool | None = None
        while True:
            # A second time if it gets worse: what they have may first be written, then no more.
            if self._stopping and told != self._dropping:
                told = self._dropping
                for slot in self._slots:
                    if slot.starting is None:
                        slot.actor.stop.remote(drop=told)
            if not self._stopping:
                self._hire()
                self._deal()
            under_way = [ref for slot in self._slots for ref in slot.pairs]
            if not under_way and (self._stopping or not (self._todo or self._suspects)):
                break
            starting = [slot.starting for slot in self._slots if slot.starting is not None]
            if not under_way and not starting:
                # All that is left is with another process.
                time.sleep(PATIENCE)
                continue
            ready, _ = self._ray.wait(under_way + starting, num_returns=1, timeout=_TICK)
            for ref in ready:
                for outcome in self._receive(ref):
                    yield outcome
                    if outcome.fatal and isinstance(outcome.failure, DDFUpError):
                        fatal = fatal or outcome.failure
                    if outcome.fatal or (outcome.failure is not None and self._settings.fail_fast):
                        self._stopping = self._dropping = True
            if not self._stopping:
                self._watch()
        if fatal is not None:
            raise fatal

    # --- workers ---

    def _prepare(self, mark: str) -> None:
        resources = self._ray.cluster_resources()
        gpu = self._plan.device == "cuda" or (self._plan.device == "auto" and resources.get("GPU", 0) >= 1)
        local = isinstance(self._settings.out_dir, Path) or any(
            isinstance(path, Path) for pair in self._pairs for path in pair.sources
        )
        job = Job(
            version=__version__,
            settings=self._settings,
            device="cuda" if gpu else "cpu",
            precision=self._plan.precision,
            tile=self._plan.tile,
            mark=mark,
            folder=Path.cwd(),
            local=local,
            kernels=os.environ.get("DDFUP_KERNELS"),
        )
        self._needs = {"CPU": 1.0, **({"GPU": 1.0} if gpu else {})}
        self._worker = self._ray.remote(Worker).options(
            num_cpus=1,
            num_gpus=1 if gpu else 0,
            # One more for the call to stop.
            max_concurrency=PAIRS_PER_NETWORK + 1,
            max_restarts=0,
            max_task_retries=0,
        )
        # Once for the whole cluster, and not with every worker.
        self._job = self._ray.put(job)
        self._weights = self._ray.put(self._plan.model.read_bytes())

    def _hire(self) -> None:
        """Have as many workers as the cluster has room for, and the rest of the work needs."""
        now = time.monotonic()
        if self._looked < 0 or now - self._looked >= _LOOK:
            self._looked = now
            total = self._ray.cluster_resources()
            room = min(int(total.get(kind, 0) // amount) for kind, amount in self._needs.items())
            self._wanted = self._settings.workers or max(1, room)
        if self._stillborn >= _STILLBORN and self._slots:
            # A bad machine among good ones would swallow one worker after the other.
            return
        left = len(self._todo) + len(self._suspects) + sum(len(slot.pairs) for slot in self._slots)
        for _ in range(min(self._wanted, left) - len(self._slots)):
            actor = self._worker.remote(self._job, self._weights)
            self._slots.append(_Slot(actor, actor.check.remote()))

    def _deal(self) -> None:
        """Give pairs to workers that have room for them."""
        slots = sorted((slot for slot in self._slots if slot.starting is None), key=lambda slot: len(slot.pairs))
        # One worker is kept for the suspects: it is given nothing else until it has none, and then one at a time.
        if not self._suspects:
            for slot in slots:
                slot.alone = slot.alone and bool(slot.pairs)
        elif slots and not any(slot.alone for slot in slots):
            slots[0].alone = True
        for slot in slots:
            if slot.alone:
                if not slot.pairs and self._suspects:
                    self._give(slot, self._suspects.popleft())
                continue
            while len(slot.pairs) < PAIRS_PER_NETWORK and self._todo and self._todo[0][0] <= time.monotonic():
                self._give(slot, self._todo.popleft()[1])

    def _give(self, slot: _Slot, work: Pair) -> None:
        slot.pairs[slot.actor.process.remote(work)] = work

    def _receive(self, ref: Any) -> Iterator[Outcome]:
        """Take what a worker has to say: that it is there, or what became of a pair, or nothing any more."""
        slot = next((slot for slot in self._slots if ref is slot.starting or ref in slot.pairs), None)
        if slot is None:
            return
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            yield from self._bury(slot, error)
            return
        if ref is slot.starting:
            problem = answer[1]
            if problem is not None:
                raise problem
            slot.starting, self._stillborn = None, 0
            return
        work = slot.pairs.pop(ref)
        if answer is not None:
            # The caller's own pair, not its copy.
            answer.pair = work
            yield answer
        elif not self._stopping:
            self._todo.append((time.monotonic() + PATIENCE, work))

    def _bury(self, slot: _Slot, error: Exception) -> Iterator[Outcome]:
        self._slots.remove(slot)
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(slot.actor)
        if slot.starting is not None:
            self._stillborn += 1
            if self._stillborn >= _STILLBORN and not self._slots:
                raise DeviceError(
                    f"a worker must start on the cluster; {self._stillborn} did not: {_reason(error)}",
                    "is the same ddfup installed on every machine?",
                ) from error
            return
        if slot.pairs:
            _logger.warning("a worker ended unexpectedly; its pairs are done again by another")
        for work in slot.pairs.values():
            self._deaths[work.name] += slot.alone
            if self._deaths[work.name] < _DEATHS:
                self._suspects.append(work)
                continue
            failure = DeviceError(
                f"{work.depth}: its worker must not end before it; {_DEATHS} did, with no other pair",
                "is there enough memory? the cluster's log says more",
            )
            yield Outcome(work, self._outputs.out(work), failure=failure)

    def _watch(self) -> None:
        """Say so, and in the end give up, if there is no worker."""
        now = time.monotonic()
        if any(slot.starting is None for slot in self._slots) or not self._slots:
            self._without, self._noted = -1.0, False
            return
        if self._without < 0:
            self._without = now
        since = now - self._without
        if since < (self._plan.wait if self._noted else min(_NOTE, self._plan.wait)):
            return
        total, free = self._ray.cluster_resources(), self._ray.available_resources()
        needs = " and ".join(f"{amount:g} {kind}" for kind, amount in self._needs.items())
        # Workers that have a place, and are just loading, hold theirs.
        there = ", ".join(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind} free" for kind in self._needs)
        if since >= self._plan.wait:
            raise DeviceError(
                f"the cluster must have room for a worker ({needs}); none has started in {since:.0f} s: {there}",
                "ray status shows who has it; --ray-wait waits longer, --device cpu needs no GPU",
            )
        self._noted = True
        _logger.warning("waiting for the cluster to start a worker (%s): %s", needs, there)

    def _dismiss(self) -> None:
        for slot in self._slots:
            with contextlib.suppress(Exception):  # it may be gone, and the cluster with it
                self._ray.kill(slot.actor)


def _import_ray() -> Any:
    # Nobody is to be told that a batch runs; and Ray reads this when it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ArgumentError(f"--engine ray must have Ray; got {error}", "pip install 'ddfup[ray]'") from error
    return ray


@contextlib.contextmanager
def _connected(ray: Any, workers: int | None) -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS names, else start one on this machine for the time of the batch."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    _check_address(address)
    handlers = {number: signal.getsignal(number) for number in REQUESTS}
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        cores = os.cpu_count() or 1
        # Only weights and words go through its memory.
        settings |= {"num_cpus": max(cores, workers or 0), "include_dashboard": False, "object_store_memory": 10**8}
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(address=address, **settings)
    except Exception as error:  # of many kinds: no cluster, another version of Ray or Python, no permission
        ray.shutdown()
        raise DeviceError(
            f"the Ray cluster {address!r} must be there and of this version; got {_reason(error)}",
            "is it running, with the same Python, and your token (RAY_AUTH_MODE, RAY_AUTH_TOKEN)? without "
            "RAY_ADDRESS one is started here",
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            # Ray has put its own in their place.
            for number, handler in handlers.items():
                signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse an address where nobody answers; Ray itself would try for minutes."""
    host, mark, port = address.removeprefix("ray://").rpartition(":")
    if not mark or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()
    except (OSError, OverflowError) as error:
        raise DeviceError(
            f"RAY_ADDRESS must be that of a running Ray cluster; got {address!r}: {error}",
            "ray start --head starts one",
        ) from error


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    # The last line of a traceback is what happened.
    return (lines[-1] if lines else type(error).__name__)[:300]
