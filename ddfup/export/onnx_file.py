"""ONNX files in standard operators: made, and run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from ddfup.errors import ArgumentError, ExportError
from ddfup.export.checks import Inputs
from ddfup.export.tracing import without_cache

# 18 of 2022: what the runtimes of today read.
OPSET = 18
INPUTS = ("depth", "guide", "valid")
OUTPUT = "result"
_AXES = {"depth": "depth", "valid": "depth", "guide": "guide", "result": "guide"}


def check_packages() -> None:
    """Make sure that what this needs is installed.

    Raises:
        ArgumentError: If it is not.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ArgumentError(
            f"onnx files must have their packages installed; {error.name} is not", "pip install 'ddfup[export]'"
        ) from None


def make(program: ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    """Translate a traced network.

    Args:
        program: From :func:`ddfup.export.tracing.trace`.
        metadata: Written into the file.

    Returns:
        The file, weights included.

    Raises:
        ExportError: If a part of the network has no translation.
    """
    with _quiet(), without_cache():
        try:
            translated = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(INPUTS),
                output_names=[OUTPUT],
                report=False,
                verbose=False,
                verify=False,
            )
        except RuntimeError as error:
            raise ExportError(f"the network must have a translation to ONNX; got {_cause(error)}") from error
    assert translated is not None
    model = translated.model_proto
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        for axis, side in ((2, "height"), (3, "width")):
            dimension = value.type.tensor_type.shape.dim[axis]
            if dimension.dim_param:
                dimension.dim_param = f"{_AXES[value.name]}_{side}"
    foreign = {node.domain for node in model.graph.node} - {"", "ai.onnx"}
    if foreign or model.functions:
        raise ExportError(f"the file must hold standard operators only; got those of {', '.join(sorted(foreign))}")
    for key, text in metadata.items():
        model.metadata_props.add(key=key, value=text)
    data: bytes = model.SerializeToString()
    return data


def _cause(error: Exception) -> str:
    """The cause in one line: what the translation raises is a summary of many, the deepest first."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to oneself what the translation says of its own progress."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def read_metadata(data: bytes) -> dict[str, str]:
    """Read what :func:`make` wrote into a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Only to be read: nothing is to be made faster.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    found: dict[str, str] = dict(session.get_modelmeta().custom_metadata_map)
    return found


def load(data: bytes, *, threads: int | None = None) -> Callable[[Inputs], Tensor]:
    """Make a function of a file, run by ONNX Runtime on the CPU.

    Args:
        data: The file.
        threads: CPU threads; None: as many as PyTorch's.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> Tensor:
        feed: dict[str, Any] = {name: np.asarray(value) for name, value in zip(INPUTS, inputs, strict=True)}
        return torch.from_numpy(session.run([OUTPUT], feed)[0])

    return run
