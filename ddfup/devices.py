"""Which device a name stands for, and how devices differ; the one place that asks PyTorch what there is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch

from ddfup._shared import SharedContext
from ddfup.errors import ArgumentError, DeviceError

# How an error tells that there was too little memory. The CPU's allocator and CUDA's libraries have no exception type
# of their own; of an allocation within our own kernels PyTorch's stable interface keeps no more than which call failed.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_FAILED_CALL = "API call failed"
_ALLOCATIONS = ("aten::new_empty", "aten::empty")


def find_device(device: str) -> torch.device:
    """Return the device that a name stands for.

    Args:
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:i". Under ``torchrun`` a GPU without
            number is that of the process (LOCAL_RANK), elsewhere the first.

    Raises:
        ArgumentError: If the name is none of these.
        DeviceError: If the device is absent.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rule = f"device must be 'auto', 'cpu', 'cuda' or 'cuda:i'; got {device!r}"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(rule) from error
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type != "cuda":
        raise ArgumentError(rule)
    if not torch.cuda.is_available():
        raise DeviceError(
            f"device {device!r}: this PyTorch sees no CUDA GPU", "use --device cpu; `ddfup doctor` says more"
        )
    index = found.index if found.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise DeviceError(f"device {device!r}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    return torch.device("cuda", index)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an error of PyTorch or of the op means that a device has too little memory."""
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or any(sign in text for sign in _OUT_OF_MEMORY)
        or (_FAILED_CALL in text and any(call in text for call in _ALLOCATIONS))
    )


@contextlib.contextmanager
def _unrounded() -> Iterator[None]:
    with contextlib.ExitStack() as before:
        before.callback(_set_convolutions())
        before.callback(_set_products())
        yield


def _set_convolutions() -> Callable[[], None]:
    """Set what cuDNN's convolutions do; return what undoes it."""
    # Not `cudnn.allow_tf32`, which must not be read where the user has set this.
    settings = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    return lambda: setattr(settings, "fp32_precision", before)


def _set_products() -> Callable[[], None]:
    """Set what products of matrices do; return what undoes it."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # Set by the newer names, after which PyTorch refuses to read the older ones.
        settings = torch.backends.cuda.matmul
        newer = settings.fp32_precision
        settings.fp32_precision = "ieee"
        return lambda: setattr(settings, "fp32_precision", newer)
    # The older names set both; with the newer alone PyTorch would complain of a mixture in every product.
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _search() -> Iterator[None]:
    settings = torch.backends.cudnn
    before = settings.benchmark
    settings.benchmark = True
    try:
        yield
    finally:
        settings.benchmark = before


# Keeps GPUs from rounding the factors of convolutions and matrix products to 10 bits (TF32), as PyTorch lets them.
# Results would differ from the CPU's, and those of tiles from the whole's, by up to 0.002 of the range of depth.
full_float32 = SharedContext(_unrounded)

# Has cuDNN try its ways of computing each convolution whose sizes are new to it, which takes as long as some calls, and
# pays where sizes come again. Without TF32 its guess can be Fourier transforms, and a network take seven times as long
# (an H100, 1920 x 1080).
cudnn_search = SharedContext(_search)
