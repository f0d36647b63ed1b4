"""The command line called in this process, with a stand-in for the network and everything that it writes caught."""

import contextlib
import io
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

from ddfup import cli, models
from ddfup.batch import pool

# One task of many is not what is tried here.
_CLUSTER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")


class Nearest:
    """Enlarges without a network, so that every expected pixel is known; loads no PyTorch."""

    model_name, device, kernels = "nearest", "cpu", "none"

    def __init__(self, weights_sha256="5eed"):
        self.weights_sha256 = weights_sha256
        self.calls = 0

    def __call__(self, depth, guide, *, valid=None, fill=False):
        self.calls += 1
        height, width = guide.shape[:2]
        rows, columns = np.arange(height) * depth.shape[0] // height, np.arange(width) * depth.shape[1] // width
        values = np.where(valid, depth, 2.0 if fill else np.nan).astype(np.float32)
        return values[np.ix_(rows, columns)]


@contextlib.contextmanager
def nearest(weights_sha256="5eed"):
    """Put the stand-in in the network's place; yields it."""
    network = Nearest(weights_sha256)
    info = models.ModelInfo("nearest", "none", Path("none"), 1, weights_sha256, "", {})
    with (
        mock.patch.object(pool, "make_pool", lambda *arguments: pool.LocalPool(network)),
        mock.patch.object(models, "find_model", lambda name: info),
        mock.patch("ddfup.commands.upsample.make_upsampler", lambda *arguments: network),
        mock.patch.dict(os.environ),
    ):
        for name in _CLUSTER:
            os.environ.pop(name, None)
        yield network


@dataclass(frozen=True)
class Call:
    """What a command said.

    Attributes:
        code: Exit code.
        out: What came on stdout.
        err: What came on stderr.
    """

    code: int
    out: bytes
    err: str

    @property
    def records(self):
        """The JSON objects on stdout; whatever else is there raises ValueError."""
        return [json.loads(line) for line in self.out.decode("ascii").splitlines()]

    def lines(self, kind):
        """The lines of stderr that begin with ``error: ``, ``hint: `` and the like."""
        return [line for line in self.err.splitlines() if line.startswith(f"{kind}: ")]


@contextlib.contextmanager
def _caught():
    """Catch what this process and its C libraries write to stdout and stderr; yields a function to read both."""
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)]
        streams = []
        for number, file in zip((1, 2), files, strict=True):
            kept = os.dup(number)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, number)
            os.dup2(file.fileno(), number)
            handler = "strict" if number == 1 else "backslashreplace"
            raw = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
            streams.append(io.TextIOWrapper(raw, "utf-8", handler, write_through=True))

        def read():
            for stream in streams:
                stream.flush()
            for file in files:
                file.seek(0)
            return files[0].read(), files[1].read().decode("utf-8", "replace")

        with mock.patch.object(sys, "stdout", streams[0]), mock.patch.object(sys, "stderr", streams[1]):
            yield read


def call(folder, *arguments):
    """Run one command in a folder."""
    with _chdir(folder), _caught() as read:
        code = cli.main([str(argument) for argument in arguments])
        return Call(code, *read())


@contextlib.contextmanager
def _chdir(folder):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
