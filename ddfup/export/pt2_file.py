"""PyTorch's ``pt2`` files: a program for ``torch.export.load``, or compiled code for ``aoti_load_package``."""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ddfup.errors import ExportError
from ddfup.export.checks import Inputs

_METADATA = "ddfup.json"


def has_compiler() -> bool:
    """Tell whether PyTorch finds a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except (InvalidCxxCompiler, OSError, RuntimeError):
        return False


def make(program: ExportedProgram, metadata: Mapping[str, str], *, compiled: bool) -> bytes:
    """Pack a traced network.

    Args:
        program: From :func:`ddfup.export.tracing.trace`.
        metadata: Written into the file.
        compiled: Whether to compile it for this machine's processor.

    Returns:
        The file, weights included.

    Raises:
        ExportError: If compiling fails.
    """
    with tempfile.TemporaryDirectory(prefix="ddfup-export-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.pt2"
        if compiled:
            from torch._inductor import aoti_compile_and_package

            settings = {"aot_inductor.metadata": dict(metadata)}
            try:
                with _unknown_ranges():
                    aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
            # The compiler, its wrapper and PyTorch have exceptions of their own.
            except Exception as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise ExportError(
                    f"the network must compile; got {reason}", "--content program needs no compiler"
                ) from error
        else:
            torch.export.save(program, path, extra_files={_METADATA: json.dumps(dict(metadata))})
        return path.read_bytes()


@contextlib.contextmanager
def _unknown_ranges() -> Iterator[None]:
    """Let PyTorch's compiler go on where it does not know the range of an index.

    While it simplifies indices through nested views, as of pixel shuffles, it forgets the ranges of its loops and
    fails an assertion (https://github.com/pytorch/pytorch/issues/187337). That nothing is known is a right answer.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    evaluate = ShapeEnv._maybe_evaluate_static

    def unless_unknown(*args: Any, **kwargs: Any) -> Any:
        try:
            return evaluate(*args, **kwargs)
        except AssertionError as error:
            if "vr must not be None" not in str(error):
                raise
            return None

    with mock.patch.object(ShapeEnv, "_maybe_evaluate_static", unless_unknown):
        yield


def load(path: Path, *, compiled: bool) -> Callable[[Inputs], Tensor]:
    """Make a function of a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if compiled:
            from torch._inductor import aoti_load_package

            package = aoti_load_package(str(path))
            return lambda inputs: _only(package(*inputs))
        module = torch.export.load(path).module()

    def run(inputs: Inputs) -> Tensor:
        with torch.inference_mode():
            return _only(module(*inputs))

    return run


def _only(outputs: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def read_metadata(path: Path, *, compiled: bool) -> dict[str, str]:
    """Read what :func:`make` wrote into a file."""
    if compiled:
        from torch._inductor import aoti_load_package

        found: dict[str, str] = aoti_load_package(str(path)).get_metadata()
        return found
    files: dict[str, Any] = {_METADATA: ""}
    torch.export.load(path, extra_files=files)
    content: dict[str, str] = json.loads(files[_METADATA])
    return content
