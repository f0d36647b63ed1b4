"""What a command may find around it: no rights, no GPU, no memory."""

import contextlib
import os
from unittest import mock

from torture import disks


@contextlib.contextmanager
def unprivileged(folder):
    """Take root's rights from this process for the length of one call."""
    folder.chmod(0o777)
    for path in folder.rglob("*"):
        if path.is_dir() and path.name != "out":
            path.chmod(0o777)
    if os.geteuid() != 0:
        yield
        return
    for place in folder.parents:
        if not place.stat().st_mode & 0o001:
            place.chmod(place.stat().st_mode | 0o011)
    before = os.getresuid()
    # The real one as well: os.access asks for it.
    os.setresuid(disks.NOBODY, disks.NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(*before)


@contextlib.contextmanager
def without_gpu(folder):
    with mock.patch("torch.cuda.is_available", lambda: False):
        yield


@contextlib.contextmanager
def short_memory(folder):
    """Let PyTorch's own allocator be asked for more than there is when the network runs."""
    import torch

    from ddfup.inputs import Guide

    original = Guide.part

    def greedy(self, *arguments):
        torch.empty(1 << 60, dtype=torch.uint8)
        return original(self, *arguments)

    with mock.patch.object(Guide, "part", greedy):
        yield
