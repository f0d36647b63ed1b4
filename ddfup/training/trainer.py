"""The training loop: one process on CPU or GPU, or many GPUs under ``torchrun``.

Checkpoints hold everything that the next step depends on (weights, averages, optimiser, step number) and the
configuration, which must stay; batches depend on the step number alone, so that a resumed run continues exactly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce, destroy_process_group, init_process_group, is_initialized
from torch.nn.parallel import DistributedDataParallel

from ddfup import models
from ddfup.devices import find_device
from ddfup.errors import ArgumentError, InputError, OutputError, WeightsError
from ddfup.training import checkpoint
from ddfup.training.config import TrainingConfig
from ddfup.training.data import Batch, StepBatches, load_frames
from ddfup.training.distillation import Distillation
from ddfup.training.loading import is_loaders_end, load_batches
from ddfup.training.optimization import UNIT, learning_rate, loss_function, squared_weight, take_step
from ddfup.training.recording import RecordedGradients
from ddfup.training.tuning import tuning_error, tuning_pairs


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run reports after a step.

    Attributes:
        step: Steps done.
        steps: Length of the schedule.
        mean_loss: Running mean of the loss, where the network is.
        tune: Last measured tuning errors, centimetres, by "degradation xfactor".
    """

    step: int
    steps: int
    mean_loss: Tensor
    tune: dict[str, float]

    @property
    def loss(self) -> float:
        """Running mean of the loss; whoever reads it waits for the GPU."""
        return float(self.mean_loss)


class Trainer:
    """One training run in one folder; a context manager that leaves the process group, see :meth:`close`.

    Args:
        config: What to train.
        root: Folder that the data sets' paths are relative to.
        out: Folder for ``checkpoint.pt``, ``log.jsonl`` and the weight file.
        device: As of :func:`ddfup.devices.find_device`; under ``torchrun`` each process takes the GPU of its
            LOCAL_RANK.
        resume: Continue from ``out/checkpoint.pt``, with the configuration and the number of processes that the run
            began with; without it an existing checkpoint is refused.
        workers: Loader processes.
        init: Name or weight file of the model whose weights a new run starts from; None: random ones.

    Raises:
        InputError: If data are missing, or ``out`` holds a run already, or none that can be resumed.
        PairingError: If two files of a data set's folder have one stem.
        OutputError: If ``out`` cannot be a folder.
        DeviceError: If the device is absent.
        WeightsError: If ``init`` cannot be read or has other sizes than the configuration, or a teacher cannot be read.
    """

    def __init__(
        self,
        config: TrainingConfig,
        root: Path,
        out: Path,
        *,
        device: str = "cpu",
        resume: bool = False,
        workers: int = 1,
        init: str | None = None,
    ) -> None:
        self.config, self.out, self.workers = config, out, workers
        self.checkpoint = out / "checkpoint.pt"
        if not config.data.train:
            raise InputError("the configuration names no [[data.train]] set")
        if self.checkpoint.exists() and not resume:
            raise InputError(
                f"{self.checkpoint}: a run is here already",
                "continue it with --resume, or choose another --out",
            )
        if resume and init is not None:
            raise ArgumentError(f"init must be left out of a resumed run, which has weights already; got {init!r}")
        if resume and not self.checkpoint.exists():
            raise InputError(f"{self.checkpoint}: no checkpoint to resume from", "leave --resume out to start a run")
        self.device = find_device(device)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{out}: cannot be made a folder ({error.strerror})", "choose another --out") from error
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        data, optimization = config.data, config.optimization
        # Before the data, which may take minutes.
        saved = checkpoint.read(self.checkpoint, self.device, config, self.world) if resume else None
        torch.manual_seed(optimization.seed)
        network = models.build(config.model.architecture, config.model.config)
        if init is not None:
            _start_from(init, network, config)
        self.distillation: Distillation | None = None
        if config.distillation is not None:
            self.distillation = Distillation.load(
                config.distillation, self.device, seed=optimization.seed, rank=self.rank
            )

        sets = [(load_frames(root, s), s.weight) for s in data.train]
        self.batches = StepBatches(sets, data, seed=optimization.seed, rank=self.rank, world=self.world)
        frames = [frame for s in data.tune for frame in load_frames(root, s)]
        self.tune_frames = tuning_pairs(frames, data.tune_frames) if frames else []

        memory_format = torch.channels_last
        self.network = network.to(self.device, memory_format=memory_format)  # type: ignore[call-overload]
        self.averaged = models.build(config.model.architecture, config.model.config)
        self.averaged = self.averaged.to(self.device, memory_format=memory_format).requires_grad_(False)  # type: ignore[call-overload]
        self.averaged.load_state_dict(self.network.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=optimization.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=optimization.weight_decay,
            fused=True if self.device.type == "cuda" else None,
        )
        self.step = 0
        # Stays on the device, where reading it would make every step wait, and is as exact as Python's numbers.
        self._loss = torch.tensor(math.nan, dtype=torch.float64, device=self.device)
        self.tune: dict[str, float] = {}
        self._stopping = False
        # False while a step changes the weights: what an exception leaves behind then is no state to continue
        # from.
        self._whole = True
        if saved is not None:
            self._restore(saved)
        self.parallel: nn.Module = self.network
        self._recorded: RecordedGradients | None = None
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda" and self.world == 1:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._recorded = RecordedGradients(self._gradients, list(self.network.parameters()))
        self._leave_group: Callable[[], object] = _do_nothing
        if self.world > 1:
            # After all that may fail on the way here. A group that the caller made stays the caller's.
            if not is_initialized():
                init_process_group("nccl" if self.device.type == "cuda" else "gloo")
                # Also when nobody closes the trainer.
                self._leave_group = weakref.finalize(self, _destroy_group)
            try:
                # Not every level takes part in every step.
                self.parallel = DistributedDataParallel(self.network, find_unused_parameters=True)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Trainer:
        """Return the trainer; :meth:`close` is called at the end of the ``with`` block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the process group."""
        self.close()

    def close(self) -> None:
        """Leave the process group, if it was made here; no run can follow then."""
        self._leave_group()

    @property
    def loss(self) -> float:
        """Running mean of the loss; NaN before the first step."""
        return float(self._loss)

    @property
    def weights(self) -> Path:
        """The weight file that the run writes."""
        return self.out / f"{self.config.model.architecture}_{self.config.model.name}.safetensors"

    def stop(self) -> None:
        """Ask :meth:`run` to end, with a checkpoint, after the step under way; safe in a signal handler."""
        self._stopping = True

    def run(self, *, max_minutes: float = math.inf, on_step: Callable[[Progress], None] | None = None) -> bool:
        """Train until the schedule or the time ends; write checkpoints on the way and weights at the end.

        Args:
            max_minutes: Stop after this time, with a checkpoint.
            on_step: Called after every step.

        Returns:
            Whether the schedule is complete.

        Raises:
            OutputError: If a file cannot be written.
            InputError: If the data give no samples.
        """
        with self._on_stream():
            return self._run(max_minutes, on_step)

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Work on the stream that steps are recorded on: PyTorch records no gradients of a GPU's default one."""
        if self._stream is None:
            yield
            return
        outside = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outside.wait_stream(self._stream)

    def _run(self, max_minutes: float, on_step: Callable[[Progress], None] | None) -> bool:
        section = self.config.optimization
        begin = saved = time.monotonic()
        measured = self.step
        try:
            remaining = range(self.step, section.steps)
            for batch in load_batches(self.batches, remaining, workers=self.workers, device=self.device):
                self._train_step(batch.to(self.device))
                if self.step % section.tune_every == 0:
                    self._measure()
                    measured = self.step
                if on_step is not None:
                    on_step(Progress(self.step, section.steps, self._loss, self.tune))
                now = time.monotonic()
                if now - saved > 60 * section.checkpoint_minutes:
                    self._save()
                    saved = now
                if self._agree(self._stopping or now - begin > 60 * max_minutes):
                    break
            complete = self.step >= section.steps
            if complete and measured != self.step:
                self._measure()
            self._save()
        except BaseException as error:
            # Also on ctrl-C: what was learned is kept.
            if self._whole:
                try:
                    self._save()
                except RuntimeError:
                    # PyTorch tells of a loader's process that was killed wherever the program is, and does so once.
                    self._save()
            # A signal for all processes of a job ends the loader's, too: nothing that went wrong.
            if self._stopping and self._whole and is_loaders_end(error):
                return self.step >= section.steps
            raise
        finally:
            # Not at the beginning: whoever asks before the first step means this run.
            self._stopping = False
        return complete

    def _agree(self, stop: bool) -> bool:
        """Whether any of the processes wants to stop: the others would wait for one that left alone."""
        if self.world == 1:
            return stop
        flag = torch.tensor(float(stop), device=self.device)
        all_reduce(flag, ReduceOp.MAX)
        return bool(flag.item())

    def _train_step(self, batch: Batch) -> None:
        section = self.config.optimization
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, section)
        if self.distillation is not None:
            with self._autocast():
                batch = self.distillation(batch, self.step)
        squared = torch.full((), squared_weight(self.step, section), device=self.device)
        inputs = batch.depth, batch.guide, batch.target, batch.std, batch.weight, squared
        if self._recorded is None:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._gradients(*inputs, ratio=batch.ratio)
        else:
            loss = self._recorded(*inputs, ratio=batch.ratio)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), section.clip * UNIT)
        value = loss.double()
        mean = torch.where(self._loss.isnan(), value, 0.99 * self._loss + 0.01 * value)
        self._whole = False
        take_step(self.optimizer, norm)
        self.step += 1
        # A new tensor: reports keep the old one.
        self._loss = torch.where(value.isfinite(), mean, self._loss)
        decay = min(section.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.network.parameters()), 1 - decay)
        self._whole = True

    def _gradients(
        self,
        depth: Tensor,
        guide: Tensor,
        target: Tensor,
        std: Tensor,
        weight: Tensor,
        squared: Tensor,
        *,
        ratio: float,
    ) -> Tensor:
        """Compute the loss of a batch, and leave its gradients at the parameters."""
        guide = guide.contiguous(memory_format=torch.channels_last)
        with self._autocast():
            prediction = self.parallel(depth, guide, depth > 0)
        huber = self.config.optimization.huber
        loss = loss_function(prediction.float(), target, std, ratio, squared, weight, huber=huber)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _autocast(self) -> torch.autocast:
        half = self.config.optimization.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def _measure(self) -> None:
        """Measure the averaged weights on the tuning frames and log the result."""
        if self.rank != 0:
            return
        self.tune = tuning_error(self.averaged, self.tune_frames, self.device) if self.tune_frames else {}
        record = {
            "step": self.step,
            "loss": None if math.isnan(self.loss) else round(self.loss, 5),
            "learning_rate": learning_rate(self.step, self.config.optimization),
            "time": time.time(),
            "tune": self.tune,
        }
        path = self.out / "log.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror})") from error

    def _save(self) -> None:
        """Write the checkpoint and the averaged weights, each atomically."""
        if self.rank != 0:
            return
        state: dict[str, Any] = {
            "config": dataclasses.asdict(self.config),
            "processes": self.world,
            "step": self.step,
            "loss": self.loss,
            "tune": self.tune,
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        model = self.config.model
        checkpoint.write(self.checkpoint, state)
        try:
            models.save_weights(
                self.weights,
                self.averaged,
                architecture=model.architecture,
                name=model.name,
                description=model.description,
            )
        except OSError as error:
            if is_loaders_end(error):
                raise
            raise OutputError(f"{self.weights}: cannot be written ({error})") from error

    def _restore(self, state: dict[str, Any]) -> None:
        with checkpoint.naming_damage(self.checkpoint):
            self.network.load_state_dict(state["network"])
            self.averaged.load_state_dict(state["averaged"])
            for group in state["optimizer"]["param_groups"]:
                # How a step is computed depends on the device, which may be another one.
                group["fused"] = self.optimizer.defaults["fused"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.tune = state["step"], state["tune"]
            self._loss = torch.full_like(self._loss, state["loss"])


def _start_from(name_or_path: str, network: nn.Module, config: TrainingConfig) -> None:
    """Give a new network the weights of a trained one of the same architecture and sizes."""
    info = models.find_model(name_or_path)
    if info.architecture != config.model.architecture:
        raise WeightsError(
            f"{info.path}: architecture must be {config.model.architecture!r}; got {info.architecture!r}",
            "choose other initial weights, or another configuration",
        )
    trained = models.load_model(info.path)
    if trained.config != network.config:
        raise WeightsError(
            f"{info.path}: sizes must be {network.config}; got {trained.config}",
            "give the configuration's [model.config] the sizes of the weights",
        )
    network.load_state_dict(trained.state_dict())


def _do_nothing() -> None:
    pass


def _destroy_group() -> None:
    if is_initialized():
        destroy_process_group()
