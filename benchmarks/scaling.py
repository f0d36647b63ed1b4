"""How time and memory of a network grow: against pixels, against the ratio, against threads.

Run from the checkout: ``python benchmarks/scaling.py [--quick] [--series NAME] [--json FILE] [-o FOLDER]``; the plot
needs ``pip install 'ddfup[bench]'``. Each point is a process of its own. Small images are run often and the median is
taken, large ones once. CPU seconds are shown, which other work on the machine changes less than seconds. ``--json``
keeps what the file has of other series, so that they can be measured one by one; ``--series none`` only draws.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ddfup.models import DEFAULT_MODEL
from ddfup.speed import network, results
from ddfup.terminal import print_table

RATIO = 8
MEGAPIXELS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
RATIOS = (1, 2, 4, 8, 16, 32)
SERIES = ("pixels", "ratio", "threads")
# From here on one run is long enough to be trusted, and no more can be waited for.
_LARGE = 5.0


def size_of(megapixels: float) -> tuple[int, int]:
    """A picture of 4:3 with sides that the ratios divide."""
    side = math.sqrt(megapixels * 1e6 / 12)
    unit = max(1, round(side / 32)) * 32
    return 4 * unit, 3 * unit


def points(options: argparse.Namespace) -> Iterator[tuple[str, network.Task]]:
    """Series and task of every point."""
    base = network.Task(options.model, size_of(options.fixed), RATIO, seconds=options.seconds)
    if "pixels" in options.series:
        for megapixels in options.megapixels:
            seconds = options.seconds if megapixels < _LARGE else 0
            yield "pixels", dataclasses.replace(base, size=size_of(megapixels), seconds=seconds)
    if "ratio" in options.series:
        for ratio in RATIOS:
            yield "ratio", dataclasses.replace(base, ratio=ratio)
    if "threads" in options.series:
        for threads in range(1, options.threads + 1):
            yield "threads", dataclasses.replace(base, threads=(threads,))


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure every point: the records of `ddfup bench`, with the series and its ratio."""
    for series, task in points(options):
        (row,) = network.bench(task)
        print(f"{series}: {row.case}, threads: {row.threads}: {row.timing.cpu:.2f} CPU s", file=sys.stderr, flush=True)
        yield {"series": series, "ratio": task.ratio, **row.record()}


def per_megapixel(record: dict[str, Any]) -> float:
    return record["cpu_s"] / record["pixels"] * 1e6


def show(records: list[dict[str, Any]]) -> None:
    """Print the points of each series."""
    costs = [per_megapixel(record) for record in records if record["series"] == "pixels"]
    middle = statistics.median(costs)
    lines = []
    for record in records:
        peak = record["peak_bytes"]
        cost = per_megapixel(record)
        lines.append(
            (
                record["series"],
                f"{record['pixels'] / 1e6:.2f}",
                f"{record['ratio']:g}",
                str(record["threads"]),
                f"{record['median_s']:.2f}",
                f"{record['cpu_s']:.2f}",
                f"{cost:.2f}",
                f"{cost / middle - 1:+.0%}" if record["series"] == "pixels" else "",
                "-" if peak is None else f"{peak / 1e6:.0f}",
            )
        )
    print_table(("series", "MPixel", "ratio", "threads", "s", "CPU s", "per MPixel", "off median", "MB"), lines)


def draw(records: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the four curves into one picture."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    series = {name: [r for r in records if r["series"] == name] for name in SERIES}
    colour = {"color": "#1f5fa8", "marker": "o", "linewidth": 1.8, "markersize": 5}

    sizes = [r["pixels"] / 1e6 for r in series["pixels"]]
    times, memory, ratios, threads = axes.flat
    times.loglog(sizes, [r["cpu_s"] for r in series["pixels"]], **colour, label="measured")
    smallest = per_megapixel(series["pixels"][0])
    times.loglog(sizes, [smallest * size for size in sizes], "--", color="#888888", label="in proportion to the first")
    times.set(xlabel="guide, megapixels", ylabel="CPU seconds", title="Time against pixels")
    times.legend(frameon=False)

    if all(r["peak_bytes"] for r in series["pixels"]):
        memory.semilogx(sizes, [r["peak_bytes"] / 1e9 for r in series["pixels"]], **colour)
    memory.set(xlabel="guide, megapixels", ylabel="peak of the process, GB", title="Memory against pixels")
    memory.set_ylim(bottom=0)

    ratios.semilogx(
        [r["ratio"] for r in series["ratio"]], [per_megapixel(r) for r in series["ratio"]], base=2, **colour
    )
    ratios.set_xticks([r["ratio"] for r in series["ratio"]], [f"{r['ratio']:g}" for r in series["ratio"]])
    ratios.set(xlabel="ratio, guide over depth", ylabel="CPU seconds per megapixel", title="Time against the ratio")
    ratios.set_ylim(bottom=0)

    first = series["threads"][0]["median_s"]
    counts = [r["threads"] for r in series["threads"]]
    threads.plot(counts, [first / r["median_s"] for r in series["threads"]], **colour, label="measured")
    threads.plot(counts, counts, "--", color="#888888", label="in proportion")
    threads.set(xlabel="threads", ylabel="times as fast as one", title="Speed against threads")
    threads.set_xticks(counts)
    threads.set_ylim(bottom=0)
    threads.legend(frameon=False)

    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e4e4e4", linewidth=0.8)
        axis.set_axisbelow(True)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--megapixels", default=MEGAPIXELS, type=lambda text: [float(n) for n in text.split(",")])
    parser.add_argument("--fixed", type=float, default=1.0, help="megapixels of the series over ratios and threads")
    parser.add_argument("--seconds", type=float, default=2.0, help="per point of a small image")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="most CPU threads")
    parser.add_argument("--quick", action="store_true", help="tiny images, few runs: a check that it runs")
    parser.add_argument("--series", action="append", choices=(*SERIES, "none"), help="repeatable; default: all")
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    parser.add_argument("-o", "--out", type=Path, help="folder for scaling.svg")
    options = parser.parse_args()
    if options.quick:
        options.megapixels, options.fixed, options.seconds = [0.02, 0.05], 0.05, 0.01
    options.series = options.series or SERIES
    content: dict[str, Any] = {"machine": results.machine(torch.device("cpu")), "model": options.model, "rows": []}
    if options.json and options.json.exists():
        content = json.loads(options.json.read_text("utf-8"))
    content["rows"] = [row for row in content["rows"] if row["series"] not in options.series]
    for record in measure(options):
        content["rows"].append(record)
        # After every point: the last ones take long.
        if options.json:
            options.json.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    show(content["rows"])
    missing = [name for name in SERIES if all(row["series"] != name for row in content["rows"])]
    if options.out and missing:
        parser.exit(
            2, f"the plot must have every series; missing: {', '.join(missing)} (measure into the same --json)\n"
        )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        where = content["machine"]
        title = f"{content['model']}, ratio {RATIO} unless said, {where['processor']}, {where['cores']} cores"
        draw(content["rows"], title, options.out / "scaling.svg")


if __name__ == "__main__":
    main()
