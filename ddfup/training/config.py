"""What a training run is made of: dataclasses read from one TOML file per model."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ddfup.configs import bundled_configs
from ddfup.degrade import DEGRADATIONS
from ddfup.errors import ArgumentError, InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """The network: its architecture, the name its weights get, one line about it, and its sizes."""

    architecture: str
    name: str
    description: str = ""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A folder below the data root with ``rgb/`` and ``depth/`` of equal stems.

    Attributes:
        path: Folder, relative to ``--data``.
        first: First frame used, in sorted order.
        last: Last frame used; None: to the end.
        border: Pixels cut off on every side.
        weight: How often a sample comes from here, relative to the other sets.
    """

    path: str
    first: int = 0
    last: int | None = None
    border: int = 0
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class DataSection:
    """Sets to train on and to tune on, and how samples are drawn from them.

    Attributes:
        train: Sets to learn from.
        tune: Sets whose error is watched.
        tune_frames: How many frames of ``tune`` are measured, spread evenly.
        degradations: Share of every kind of low resolution; at ratios below 1.5 it is always "sensor".
        ratios: Share of every ratio; "any" draws log-uniformly from 1 to 32.
        pixels: High-resolution pixels per step; the number of crops follows.
        crops: Side of the crops per ratio, in pixels: the entry of the next ratio not below.
        candidates: Random windows among which a sample is chosen, by how much there is to learn in each; 1: any.
        disparity: Share of samples turned into disparity (1 / depth).
        slopes: Share of samples to whose depth a plane is added, half to four deviations of the image's depth high
            over a crop: floors and walls seen at a glancing angle.
        shrink: Largest factor by which image and depth are shrunk together before cropping.
        augment_guide: Change exposure, colour, noise, blur, now and then take a wrong guide.
    """

    train: tuple[DataSet, ...]
    tune: tuple[DataSet, ...]
    tune_frames: int = 10
    degradations: dict[str, float] = dataclasses.field(default_factory=lambda: {"bicubic": 1.0})
    ratios: dict[str, float] = dataclasses.field(default_factory=lambda: {"4": 1.0, "8": 1.0, "16": 1.0})
    pixels: int = 98304
    crops: dict[str, int] = dataclasses.field(default_factory=lambda: {"4": 128, "8": 192, "32": 256})
    candidates: int = 4
    disparity: float = 0.0
    slopes: float = 0.0
    shrink: float = 1.0
    augment_guide: bool = False


@dataclasses.dataclass(frozen=True)
class DistillationSection:
    """Trained networks that have a part in the targets, see :mod:`ddfup.training.distillation`.

    Attributes:
        teachers: Names of bundled models, or weight files.
        truth: Share of the true depth in the targets.
    """

    teachers: tuple[str, ...]
    truth: float = 0.5


@dataclasses.dataclass(frozen=True)
class OptimizationSection:
    """How the weights are learned.

    Attributes:
        steps: Length of the schedule.
        learning_rate: Peak, reached after ``warmup`` steps, then cosine down to 1/1000 of it.
        warmup: Steps.
        weight_decay: Of AdamW.
        clip: Largest norm of the gradient of a loss in deviations of depth.
        squared: Weight of the Huber error beside the absolute one, both in deviations of the image's depth.
        squared_end: Its weight at the end; it moves there over the last quarter of the schedule.
        huber: Deviations up to which the Huber error is squared; beyond it is linear.
        ema: Decay of the averaged weights, the ones that are kept.
        precision: "fp32" or "bf16" (autocast).
        seed: Of weights and samples.
        checkpoint_minutes: Between checkpoints.
        tune_every: Steps between measurements of the tuning error.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 300
    weight_decay: float = 1e-4
    clip: float = 0.1
    squared: float = 2.0
    squared_end: float = 2.0
    huber: float = 0.5
    ema: float = 0.999
    precision: str = "fp32"
    seed: int = 0
    checkpoint_minutes: float = 2.0
    tune_every: int = 2000


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """One training run."""

    model: ModelSection
    data: DataSection
    optimization: OptimizationSection
    distillation: DistillationSection | None = None


_T = TypeVar("_T")


def _fits(value: object, kind: str) -> bool:
    """Tell whether a TOML value is of the type that a field is annotated with."""
    if kind.endswith(" | None"):
        return value is None or _fits(value, kind.removesuffix(" | None"))
    if kind.startswith("dict[str, "):
        inner = kind.removeprefix("dict[str, ").removesuffix("]")
        return isinstance(value, dict) and all(_fits(entry, inner) for entry in value.values())
    if kind == "tuple[str, ...]":
        return isinstance(value, tuple | list) and all(isinstance(entry, str) for entry in value)
    if kind in ("int", "float"):
        numbers = (int,) if kind == "int" else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool) and math.isfinite(value)
    return {"str": isinstance(value, str), "bool": isinstance(value, bool)}.get(kind, True)


def _build(kind: type[_T], table: object, where: str) -> _T:
    if not isinstance(table, Mapping):
        raise InputError(f"{where}: must be a table; got {table!r}")
    fields = {f.name: str(f.type) for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = set(table) - set(fields)
    if unknown:
        raise InputError(f"{where}: unknown key {sorted(unknown)[0]!r}", f"known keys: {', '.join(sorted(fields))}")
    for key, value in table.items():
        if not _fits(value, fields[key]):
            expected = "list of str" if fields[key] == "tuple[str, ...]" else fields[key]
            raise ArgumentError(f"{where}: {key} must be of type {expected}; got {value!r}")
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})
    except TypeError as error:
        raise InputError(f"{where}: {error}") from error


def _check_shares(shares: Mapping[str, float], where: str) -> None:
    if any(share < 0 for share in shares.values()) or not sum(shares.values()) > 0:
        raise ArgumentError(f"{where} must be shares of at least 0, one of them above; got {dict(shares)}")


def _is_ratio(text: str) -> bool:
    try:
        return 1 <= float(text) < math.inf
    except ValueError:
        return False


def _check(config: TrainingConfig, path: Path) -> None:
    """Check values against each other and the rules that types do not tell."""
    data, optimization = config.data, config.optimization
    unknown = set(data.degradations) - set(DEGRADATIONS)
    if unknown:
        raise ArgumentError(f"{path}: degradations must be of {', '.join(DEGRADATIONS)}; got {sorted(unknown)[0]!r}")
    _check_shares(data.degradations, f"{path}: degradations")
    _check_shares(data.ratios, f"{path}: ratios")
    for ratio in data.ratios:
        if ratio != "any" and not _is_ratio(ratio):
            raise ArgumentError(f"{path}: ratios must be 'any' or numbers of at least 1; got {ratio!r}")
    for ratio, side in data.crops.items():
        if not _is_ratio(ratio) or side < 2:
            raise ArgumentError(
                f"{path}: crops must give a side of at least 2 pixels per ratio; got {ratio!r} = {side}"
            )
    if not data.crops:
        raise ArgumentError(f"{path}: crops must name at least one side")
    for name in ("disparity", "slopes"):
        if not 0 <= getattr(data, name) <= 1:
            raise ArgumentError(f"{path}: {name} must be a share in [0, 1]; got {getattr(data, name)}")
    if config.distillation is not None:
        if not config.distillation.teachers:
            raise ArgumentError(f"{path}: teachers must name at least one model; got []")
        if not 0 <= config.distillation.truth <= 1:
            raise ArgumentError(f"{path}: truth must be a share in [0, 1]; got {config.distillation.truth}")
    if data.candidates < 1:
        raise ArgumentError(f"{path}: candidates must be at least 1; got {data.candidates}")
    if data.train:
        _check_shares({s.path: s.weight for s in data.train}, f"{path}: weights of [[data.train]]")
    if optimization.precision not in ("fp32", "bf16"):
        raise ArgumentError(f"{path}: precision must be 'fp32' or 'bf16'; got {optimization.precision!r}")
    for name in ("steps", "tune_every", "learning_rate", "huber"):
        if not getattr(optimization, name) > 0:
            raise ArgumentError(f"{path}: {name} must be above 0; got {getattr(optimization, name)}")
    if not 0 <= optimization.ema < 1:
        raise ArgumentError(f"{path}: ema must be in [0, 1); got {optimization.ema}")
    if optimization.seed < 0:
        raise ArgumentError(f"{path}: seed must be at least 0; got {optimization.seed}")


def load_config(name_or_path: str) -> TrainingConfig:
    """Read a training configuration.

    Args:
        name_or_path: Name of a bundled configuration, or path of a TOML file.

    Raises:
        InputError: If the file is missing, is not TOML, or has an unknown or missing key.
        ArgumentError: If a value breaks a rule.
    """
    path = bundled_configs().get(name_or_path, Path(name_or_path))
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        names = ", ".join(bundled_configs())
        raise InputError(
            f"{path}: cannot read the training configuration ({error.strerror})", f"bundled ones: {names}"
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from error

    for section in ("model", "data", "optimization"):
        if section not in table:
            raise InputError(f"{path}: section [{section}] is missing")
    data = table["data"]
    if isinstance(data, dict):
        for key in ("train", "tune"):
            entries = data.get(key, [])
            if not isinstance(entries, list):
                raise InputError(f"{path}: {key} must be written as [[data.{key}]] tables; got {entries!r}")
            data[key] = tuple(_build(DataSet, entry, f"{path}: [[data.{key}]]") for entry in entries)
    config = TrainingConfig(
        _build(ModelSection, table["model"], f"{path}: [model]"),
        _build(DataSection, data, f"{path}: [data]"),
        _build(OptimizationSection, table["optimization"], f"{path}: [optimization]"),
        _build(DistillationSection, table["distillation"], f"{path}: [distillation]")
        if "distillation" in table
        else None,
    )
    _check(config, path)
    return config
