"""The benchmark itself: pairs of a data set in, one record per image, degradation, factor and method out."""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddfup import io
from ddfup.benchmark.baselines import BASELINES
from ddfup.benchmark.low_resolution import LowResolution, cut_to, make
from ddfup.benchmark.measures import describe_measures, hole_figures
from ddfup.benchmark.protocols import Setup
from ddfup.errors import ArgumentError, InputError, PairingError
from ddfup.metrics import evaluate

if TYPE_CHECKING:
    from ddfup.inference import Upsampler

Method = Callable[[LowResolution, NDArray[Any]], NDArray[np.floating[Any]]]


@dataclass(frozen=True)
class Pair:
    """One image of a data set.

    Attributes:
        stem: Its name.
        depth: File of the true depth.
        guide: File of the picture.
    """

    stem: str
    depth: Path
    guide: Path


@dataclass(frozen=True)
class Record:
    """What one method reached on one image.

    Attributes:
        image: Stem of the files.
        degradation: How the low resolution was made.
        factor: High-resolution over low-resolution length.
        method: Name of the method.
        seconds: Time of the method.
        figures: Measure -> value; depth errors in the setup's unit.
    """

    image: str
    degradation: str
    factor: float
    method: str
    seconds: float
    figures: dict[str, float]


def find_pairs(dataset: Path, *, first: int = 0, last: int | None = None, limit: int | None = None) -> list[Pair]:
    """List the images of a data set, a folder with rgb/ and depth/ of equal stems.

    Args:
        dataset: The folder.
        first: First image in the sorted order of the stems, from 0.
        last: Last image; None: the last one there is.
        limit: Take so many of them, spread evenly.

    Raises:
        ArgumentError: If the numbers make no range.
        PairingError: If a folder is missing or empty, a stem has no partner or occurs twice.
    """
    if first < 0 or (last is not None and last < first):
        raise ArgumentError(f"--first and --last must be a range from 0 on; got {first} to {last}")
    if limit is not None and limit < 1:
        raise ArgumentError(f"--limit must be at least 1; got {limit}")
    depths, guides = (_by_stem(dataset / name) for name in ("depth", "rgb"))
    for ours, theirs, name in ((depths, guides, "rgb"), (guides, depths, "depth")):
        for stem in sorted(ours.keys() - theirs.keys())[:1]:
            raise PairingError(f"{dataset / name}: must hold the partner of {ours[stem]}; there is no {stem}.*")
    stems = sorted(depths)[first : None if last is None else last + 1]
    if not stems:
        raise PairingError(
            f"{dataset}: no image from --first {first} on; there are {len(depths)}",
            "images count from 0 in sorted order",
        )
    if limit is not None and limit < len(stems):
        stems = [stems[number * len(stems) // limit] for number in range(limit)]
    return [Pair(stem, depths[stem], guides[stem]) for stem in stems]


def _by_stem(folder: Path) -> dict[str, Path]:
    layout = "a data set is a folder with rgb/ and depth/ of equal stems"
    if not folder.is_dir():
        raise PairingError(f"{folder}: must be a folder; there is none", layout)
    files = io.files_by_stem(folder)
    if not files:
        raise PairingError(f"{folder}: must hold files; there is none", layout)
    return files


def network(upsampler: Upsampler) -> Method:
    """Make a method of a network: it gives depth everywhere, holes of the low resolution included."""

    def run(low: LowResolution, guide: NDArray[Any]) -> NDArray[np.float32]:
        return upsampler(low.depth, guide, valid=low.valid, fill=True)

    return run


def check(
    pairs: Sequence[Pair],
    setup: Setup,
    *,
    unit: io.Unit | None = None,
    max_pixels: int = io.DEFAULT_MAX_PIXELS,
) -> None:
    """Refuse, before any work, images whose headers show that they cannot be used.

    Raises:
        InputError: If a file is unreadable, the two of a pair differ in size, or an image is too small.
    """
    for pair in pairs:
        _, depth = io.read_depth_header(pair.depth, unit=unit, max_pixels=max_pixels)
        guide = io.read_guide_header(pair.guide, max_pixels=max_pixels)
        if (depth.width, depth.height) != (guide.width, guide.height):
            raise InputError(
                f"{pair.depth}: true depth must have the size of its guide {pair.guide}, "
                f"{guide.width}x{guide.height}; got {depth.width}x{depth.height}"
            )
        for factor in setup.factors:
            with _naming(pair.depth):
                height, width = cut_to((depth.height, depth.width), factor)
                if min(height, width) <= 2 * setup.border:
                    raise InputError(
                        f"the image must be larger than twice the border of {setup.border} that does not count; "
                        f"got {width}x{height}",
                        "lower --crop-border",
                    )


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before the message of an error inside."""
    try:
        yield
    except (ArgumentError, InputError) as error:
        raise InputError(f"{path}: {error.message}", error.hint) from error


def run(
    pairs: Sequence[Pair],
    setup: Setup,
    methods: Mapping[str, Method],
    *,
    unit: io.Unit | None = None,
    invalid: Sequence[float] = io.DEFAULT_INVALID,
    max_pixels: int = io.DEFAULT_MAX_PIXELS,
) -> Iterator[Record]:
    """Measure every method on every image under every degradation and factor.

    The noise of an image depends on its name and the degradation alone: all methods see the same, and a noisy sensor
    stays one from factor to factor.

    Args:
        pairs: The images.
        setup: Degradations, factors, border and unit.
        methods: Name -> what upsamples; `BASELINES` and `network` make them.
        unit: Meaning of stored depth; None: integers are millimetres, floats metres.
        invalid: Stored values that mean "no measurement". Without 0 among them, 0 is a level of disparity like
            any other, as the published figures of Middlebury and Lu have it; all levels count one more in
            relative measures then.
        max_pixels: Largest number of pixels of an image.

    Yields:
        Records, in the order of images, degradations, factors and methods.

    Raises:
        InputError: If a file cannot be used; its name is in the message.
        DeviceError: If a network's device cannot do it.
    """
    lift = 1.0 if setup.unit == "levels" and 0.0 not in invalid else 0.0
    units = {name: metric.unit for name, metric in describe_measures(setup.thresholds).items()}
    for pair in pairs:
        truth = io.read_depth(pair.depth, unit=unit, invalid=invalid, max_pixels=max_pixels).depth
        guide = io.read_guide(pair.guide, max_pixels=max_pixels)
        for degradation in setup.degradations:
            for factor in setup.factors:
                with _naming(pair.depth):
                    height, width = cut_to((truth.shape[0], truth.shape[1]), factor)
                    true, picture = truth[:height, :width], np.ascontiguousarray(guide[:height, :width])
                    seed = zlib.crc32(f"{pair.stem}/{degradation}".encode())
                    low = make(true, factor, degradation, np.random.default_rng(seed), lift=lift)
                counted = np.s_[setup.border : height - setup.border, setup.border : width - setup.border]
                for name, method in methods.items():
                    start = time.perf_counter()
                    result = method(low, picture)
                    seconds = time.perf_counter() - start
                    with _naming(pair.depth):
                        figures = evaluate(result[counted] + lift, true[counted] + lift, thresholds=setup.thresholds)
                        figures |= hole_figures(result + lift, true + lift, low, counted)
                    scaled = {
                        metric: value * (setup.scale if units[metric] == "depth" else 1)
                        for metric, value in figures.items()
                    }
                    yield Record(pair.stem, degradation, factor, name, seconds, scaled)


def make_methods(names: Sequence[str], load: Callable[[str], Upsampler]) -> tuple[dict[str, Method], list[Upsampler]]:
    """Return the methods of these names and the networks among them.

    Args:
        names: Rows of `BASELINES`, bundled models, weight files.
        load: Makes the upsampler of a model.

    Raises:
        WeightsError: If a name is neither, or a model damaged.
    """
    methods: dict[str, Method] = {}
    networks = []
    for name in dict.fromkeys(names):
        if name in BASELINES:
            methods[name] = BASELINES[name]
            continue
        upsampler = load(name)
        if upsampler.model_name in methods:
            raise ArgumentError(
                f"--method: names must be unique; {upsampler.model_name!r} of {name} is there already",
                "the name of a model is written in its weight file",
            )
        methods[upsampler.model_name] = network(upsampler)
        networks.append(upsampler)
    return methods, networks
