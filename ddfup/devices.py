"""Which device a name stands for; the one place that asks PyTorch what there is."""

from __future__ import annotations

import os

import torch

from ddfup.errors import ArgumentError, DeviceError


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
