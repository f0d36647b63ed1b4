"""The table of architectures, and the only place that reads and writes weight files.

A weight file is ``<architecture>_<tag>.safetensors``; its metadata holds the architecture, the sizes, the
model's name and the sha256 of its tensors, so that one file is all there is to a model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ddfup._resources import resource_dir
from ddfup.errors import WeightsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DEFAULT_MODEL = "base"

_FORMAT = "ddfup-1"
# Where each architecture lives: imported only when one is built, so that listing models loads no torch.
_ARCHITECTURES = {
    "pyramid": ("ddfup.models.pyramid", "GuidedPyramid"),
    "ddfupnet": ("ddfup.models.ddfupnet", "DDFUpNet"),
}


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What a weight file says of itself.

    Attributes:
        name: Name for ``--model``.
        architecture: Key of the architecture table.
        path: The file.
        parameters: Number of learned values.
        sha256: Of the whole file, hexadecimal.
        description: One line.
        config: Sizes of the network.
    """

    name: str
    architecture: str
    path: Path
    parameters: int
    sha256: str
    description: str
    config: dict[str, Any]


def build(architecture: str, config: Mapping[str, Any]) -> nn.Module:
    """Make an untrained network.

    Args:
        architecture: "pyramid" or "ddfupnet".
        config: Fields of the architecture's config class; lists stand for tuples.

    Raises:
        WeightsError: If the architecture or a field is unknown.
    """
    import importlib

    if architecture not in _ARCHITECTURES:
        raise WeightsError(f"architecture must be one of {', '.join(_ARCHITECTURES)}; got {architecture!r}")
    module, name = _ARCHITECTURES[architecture]
    network = getattr(importlib.import_module(module), name)
    try:
        sizes = network.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
    except TypeError as error:
        raise WeightsError(f"config does not fit the architecture {architecture!r}: {error}") from error
    built: nn.Module = network(sizes)
    return built


def _tensors_sha256(tensors: Mapping[str, Any]) -> str:
    """Hash names, shapes and values (numpy arrays) in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_weights(path: Path, network: nn.Module, *, architecture: str, name: str, description: str) -> None:
    """Write a weight file, atomically.

    Args:
        path: Destination; replaced if it exists.
        network: What to save; must have a ``config`` dataclass.
        architecture: Key of the architecture table.
        name: Name for ``--model``.
        description: One line.
    """
    from safetensors.numpy import save

    # Contiguous: safetensors writes an array's memory as it lies, and weights may be channels-last.
    state = network.state_dict()
    tensors = {key: value.detach().cpu().float().contiguous().numpy() for key, value in state.items()}
    metadata = {
        "format": _FORMAT,
        "architecture": architecture,
        "name": name,
        "description": description,
        "config": json.dumps(dataclasses.asdict(network.config)),  # type: ignore[call-overload]
        "tensors_sha256": _tensors_sha256(tensors),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_with_sorted_header(save(tensors, metadata)))
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _with_sorted_header(data: bytes) -> bytes:
    """Order a safetensors file's header: safetensors shuffles it, and equal weights are to be equal files."""
    begin = 8
    length = int.from_bytes(data[:begin], "little")
    header = json.dumps(json.loads(data[begin : begin + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(begin, "little") + header + data[begin + length :]


def read_info(path: Path) -> ModelInfo:
    """Read what a weight file says of itself, without its tensors.

    Raises:
        WeightsError: If the file is missing, unreadable, no safetensors file or not one of ours.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            parameters = 0
            for key in file.keys():
                count = 1
                for length in file.get_slice(key).get_shape():
                    count *= length
                parameters += count
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such weight file", "`ddfup models` lists the bundled models") from error
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"{path}: cannot read the weights ({error})", "the file is damaged or not a safetensors file"
        ) from error
    if metadata.get("format") != _FORMAT:
        raise WeightsError(
            f"{path}: not a ddfup weight file (format {metadata.get('format')!r}, must be {_FORMAT!r})",
            "weights are written by `ddfup train`",
        )
    try:
        config = json.loads(metadata["config"])
        if not isinstance(config, dict):
            raise ValueError(f"config must be an object; got {type(config).__name__}")
        return ModelInfo(
            metadata["name"],
            metadata["architecture"],
            path,
            parameters,
            digest,
            metadata["description"],
            config,
        )
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: metadata are damaged ({error})") from error


def list_models() -> list[ModelInfo]:
    """Return the bundled models, the default first.

    Raises:
        WeightsError: If a bundled file is damaged.
    """
    infos = [read_info(path) for path in sorted(resource_dir("weights").glob("*.safetensors"))]
    return sorted(infos, key=lambda info: (info.name != DEFAULT_MODEL, info.name))


def find_model(name_or_path: str | Path) -> ModelInfo:
    """Return what a model name or weight file stands for.

    Raises:
        WeightsError: If there is no such model or the file cannot be used.
    """
    known = {info.name: info for info in list_models()}
    if str(name_or_path) in known:
        return known[str(name_or_path)]
    path = Path(name_or_path)
    if path.suffix != ".safetensors" and not path.exists():
        raise WeightsError(
            f"no model named {str(name_or_path)!r}",
            f"known models: {', '.join(known)}; or give a .safetensors file",
        )
    return read_info(path)


def _read_tensors(info: ModelInfo) -> dict[str, Any]:
    """Read and check the tensors as numpy arrays."""
    import numpy as np

    try:
        with safe_open(info.path, framework="numpy") as file:
            expected = (file.metadata() or {}).get("tensors_sha256")
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{info.path}: cannot read the weights ({error})", "the file is damaged") from error
    if _tensors_sha256(tensors) != expected:
        raise WeightsError(
            f"{info.path}: the weights do not match their sha256",
            "the file is damaged: install or download it again",
        )
    for key, value in tensors.items():
        if not np.isfinite(value).all():
            raise WeightsError(
                f"{info.path}: {key} holds NaN or infinity",
                "the training diverged; use an earlier checkpoint",
            )
    return tensors


def _check_sizes(info: ModelInfo, shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse sizes that no such file can have the weights for, before a network of that many layers is made.

    Raises:
        WeightsError: If a number in the metadata is larger than every side of a tensor, and than their number.
    """
    most = max((len(shapes), *(side for shape in shapes for side in shape)))
    for key, value in info.config.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and number > most:
                raise WeightsError(
                    f"{info.path}: {key} in its metadata must be of the size of its tensors, at most {most}; "
                    f"got {number}",
                    "the file is damaged",
                )


def verify(info: ModelInfo) -> None:
    """Check that a model's tensors are whole, finite and those of its architecture.

    Raises:
        WeightsError: If they are not.
    """
    load_model(info.path)


def load_model(name_or_path: str | Path = DEFAULT_MODEL, device: torch.device | str = "cpu") -> nn.Module:
    """Build a network with its trained weights, ready for inference.

    Args:
        name_or_path: Name of a bundled model, or a weight file.
        device: Where to put it.

    Returns:
        The network in evaluation mode, parameters frozen.

    Raises:
        WeightsError: If the model is unknown, or its file damaged or of another architecture.

    Example:
        >>> network = load_model("base")
        >>> network.training
        False
    """
    import torch

    info = find_model(name_or_path)
    arrays = _read_tensors(info)
    _check_sizes(info, [array.shape for array in arrays.values()])
    try:
        network = build(info.architecture, info.config)
    except WeightsError as error:
        raise WeightsError(f"{info.path}: {error.message}", error.hint) from error
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # The sizes come from the file, so what they break is the file's fault.
        raise WeightsError(
            f"{info.path}: the sizes in its metadata do not make a {info.architecture!r} network: {error}",
            "the file is damaged",
        ) from error
    tensors: dict[str, Tensor] = {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise WeightsError(
            f"{info.path}: weights do not fit the architecture {info.architecture!r}: {first}"
        ) from error
    return network.to(device).eval().requires_grad_(False)
