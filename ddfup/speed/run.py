"""All parts of `ddfup bench`, one after the other."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ddfup.devices import find_device
from ddfup.errors import ArgumentError
from ddfup.models import DEFAULT_MODEL, find_model, list_models
from ddfup.speed import end_to_end, exported, module, network, op
from ddfup.speed.pairs import depth_size
from ddfup.speed.results import EXPORT, PARTS, Row

_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        parts: Of `PARTS`, or `EXPORT`.
        models: Names or paths; none: every bundled model for "network", the default one for "end-to-end".
        exported: Files of `ddfup export`, for "export".
        size: (width, height) of the guide.
        ratio: Guide over depth.
        dtype: "float32", "float16", "bfloat16" or "float64".
        threads: CPU threads; None: PyTorch's choice.
        quick: Tiny shapes and few rounds: a check that it runs, no figures.
        device: As for :class:`ddfup.inference.Upsampler`.

    Raises:
        ArgumentError: If a part or dtype is unknown, or the ratio does not fit the size.
        WeightsError: If a model is unknown.
        DeviceError: If the device is absent.
    """

    parts: tuple[str, ...] = PARTS
    models: tuple[str, ...] = ()
    exported: tuple[str, ...] = ()
    size: tuple[int, int] = (640, 480)
    ratio: float = 8
    dtype: str = "float32"
    threads: int | None = None
    quick: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in (*PARTS, EXPORT):
                raise ArgumentError(f"--part must be one of {', '.join((*PARTS, EXPORT))}; got {part!r}")
        if (EXPORT in self.parts) != bool(self.exported):
            raise ArgumentError(
                "--part export must come with --exported FILE, and that with it; one is missing",
                "ddfup export onnx makes one",
            )
        device = self.found_device()
        if {"network", "end-to-end"} & set(self.parts):
            depth_size(self.size, self.ratio)
            if self.dtype not in _PRECISIONS or (self.dtype == "float16" and device.type == "cpu"):
                raise ArgumentError(
                    f"--dtype of network and end-to-end must be one that the {device.type.upper()} runs networks in; "
                    f"got {self.dtype}",
                    "leave them out with --part op --part module, or use --dtype float32",
                )
            for model in self.models:
                find_model(model)

    def found_device(self) -> torch.device:
        """Return the device that is measured."""
        return find_device(self.device)

    def record(self) -> dict[str, Any]:
        """Return the settings as JSON."""
        return dataclasses.asdict(self) | {"device": str(self.found_device())}


def run(settings: Settings) -> Iterator[Row]:
    """Measure one thing after the other.

    Yields:
        The rows, as they are measured.
    """
    device, dtype = settings.found_device(), getattr(torch, settings.dtype)
    gpu = device.type == "cuda"
    # A GPU repeats a case some thousand times in a second.
    seconds = 0.01 if settings.quick else 0.3 if gpu else 1.0
    with _threads(settings.threads) as threads:
        if "op" in settings.parts:
            for case in op.QUICK if settings.quick else op.GPU_CASES if gpu else op.CASES:
                yield from op.bench(case, device=device, dtype=dtype, seconds=seconds)
        if "module" in settings.parts:
            for shape in module.QUICK if settings.quick else module.CASES:
                # Batches of 32 take the CPU minutes, and change no ratio.
                batch = shape[0] if gpu else 1
                yield from module.bench(shape, batch=batch, device=device, dtype=dtype, seconds=seconds)
    if gpu:
        torch.cuda.empty_cache()
    precision = _PRECISIONS.get(settings.dtype, "")
    if "network" in settings.parts:
        for model in settings.models or [info.name for info in list_models()]:
            # On a GPU the number of threads changes nothing.
            counts = (threads,) if gpu else tuple(sorted({1, threads}))
            yield from network.bench(
                network.Task(
                    model,
                    settings.size,
                    settings.ratio,
                    str(device),
                    precision,
                    threads=counts,
                    seconds=2 * seconds,
                )
            )
    if "end-to-end" in settings.parts:
        for model in settings.models or (DEFAULT_MODEL,):
            yield from end_to_end.bench(
                model,
                size=settings.size,
                ratio=settings.ratio,
                device=str(device),
                precision=precision,
                threads=threads,
                seconds=2 * seconds,
                runs=1 if settings.quick else 3,
            )
    if EXPORT in settings.parts:
        yield from exported.bench(
            [Path(file) for file in settings.exported],
            weights=settings.models,
            size=settings.size,
            ratio=settings.ratio,
            threads=tuple(sorted({1, threads})),
            seconds=2 * seconds,
        )


@contextlib.contextmanager
def _threads(wanted: int | None) -> Iterator[int]:
    """Let PyTorch use so many threads for a while; yield how many these are."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield wanted or before
    finally:
        torch.set_num_threads(before)
