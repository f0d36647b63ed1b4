"""Exported files beside the network they were made from, on the CPU, all in this process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ddfup import models
from ddfup.errors import ArgumentError, WeightsError
from ddfup.export import files
from ddfup.speed.pairs import make_pair
from ddfup.speed.results import EXPORT, Row
from ddfup.speed.timing import time_in_turns


def bench(
    paths: Sequence[Path],
    *,
    weights: Sequence[str] = (),
    size: tuple[int, int],
    ratio: float,
    threads: tuple[int, ...],
    seconds: float,
) -> Iterator[Row]:
    """Time files and their networks in turns, from tensors to tensor.

    Args:
        paths: Files of `ddfup export`.
        weights: Names or paths of models that the files may come from, beside the bundled ones.
        size: (width, height) of the guide.
        ratio: Guide over depth.
        threads: CPU threads, one measurement for each number.
        seconds: Per measurement.

    Yields:
        One row per file and network, for each number of threads.

    Raises:
        InputError: If a file cannot be read.
        ArgumentError: If a file does not serve the size.
        WeightsError: If its network is not at hand.
    """
    depth, guide = make_pair(size, ratio)
    inputs = (
        torch.from_numpy(depth)[None, None],
        torch.from_numpy(guide).permute(2, 0, 1)[None].float() / 255,
        torch.ones(1, 1, *depth.shape, dtype=torch.bool),
    )
    known = {info.sha256: info for info in (*models.list_models(), *map(models.find_model, weights))}
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            calls: dict[str, Callable[[], object]] = {}
            for path in paths:
                file = files.read(path, threads=count)
                name, sha256 = file.metadata["model"], file.metadata["weights_sha256"]
                _check_size(path, file.metadata, size, (depth.shape[1], depth.shape[0]))
                if sha256 not in known:
                    raise WeightsError(
                        f"{path}: its weights must be at hand to compare with; none is {name} {sha256[:12]}",
                        "name them with --model, or export again",
                    )
                network = models.load_model(known[sha256].path)
                network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                calls.setdefault(f"{name}, PyTorch", functools.partial(network, *inputs))
                calls[path.name] = functools.partial(file.run, inputs)
            with torch.inference_mode():
                timings = time_in_turns(calls, seconds=seconds, device=torch.device("cpu"))
            for method, timing in timings.items():
                case = f"{size[0]}x{size[1]}, ratio {ratio:g}, fp32"
                yield Row(EXPORT, case, method, "forward", count, timing, pixels=size[0] * size[1])
    finally:
        torch.set_num_threads(before)


def _check_size(path: Path, metadata: dict[str, str], guide: tuple[int, int], depth: tuple[int, int]) -> None:
    """Refuse sizes that a file does not serve."""
    wanted = "x".join(map(str, guide)), "x".join(map(str, depth))
    served = metadata.get("guide_size", wanted[0]), metadata.get("depth_size", wanted[1])
    multiple = int(metadata.get("guide_multiple", 1))
    if served != wanted or any(side % multiple for side in guide):
        rule = f"guides of {served[0]} with depth of {served[1]}" if "guide_size" in metadata else f"whole {multiple}s"
        raise ArgumentError(
            f"{path}: --size and --ratio must be what the file serves, {rule}; got {wanted[0]} with {wanted[1]}"
        )
    ratio = ((guide[0] / depth[0]) * (guide[1] / depth[1])) ** 0.5
    if not float(metadata.get("ratio_from", ratio)) <= ratio <= float(metadata.get("ratio_below", ratio)):
        raise ArgumentError(
            f"{path}: --ratio must be {metadata['ratio_from']} to {metadata['ratio_below']} for it; got {ratio:g}"
        )
