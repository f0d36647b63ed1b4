"""What `ddfup batch` adds to the network's own time, over many small pairs; then kills, and a Ray cluster.

Run from the checkout: ``python benchmarks/batch_overlap.py [--pairs 1000] [--kills 10] [--ray] [-o FOLDER]``.

1. The network alone, pair after pair, before and after the batch (decoding and encoding are not timed); the batch as a
   command of its own. Efficiency is the sum of the single inferences over the time of the batch.
2. ``--kills``: the same batch, killed by SIGKILL at random moments and started again, must end with the same bytes.
3. ``--ray``: the same on a Ray cluster of this machine with more workers than cores, one of them killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from ddfup import io
from ddfup.batch import pool
from ddfup.terminal import print_table

CHECKOUT = Path(__file__).resolve().parents[1]
TENTHS = 10


def write_pairs(folder: Path, count: int, size: tuple[int, int], ratio: int) -> None:
    """Write depths/ (16-bit PNG, mm) and guides/ (JPEG): steps and slopes, unlike from pair to pair."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width] / height
    for name in ("depths", "guides"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        generator = np.random.default_rng(index)
        slope, phase, place = generator.uniform(-1, 1), generator.uniform(0, 6), generator.uniform(0.4, 0.9)
        near = x + 0.2 * np.sin(5 * y + phase) > place
        depth = np.where(near, 1.2 + 0.2 * y, 3.0 + slope * x)
        picture = np.where(near[..., None], [200, 150, 90], [60, 90, 120]) + generator.normal(0, 8, (height, width, 3))
        low = depth[ratio // 2 :: ratio, ratio // 2 :: ratio]
        Image.fromarray((1000 * low).astype(np.uint16)).save(folder / f"depths/{index:05}.png")
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"guides/{index:05}.jpg", quality=92)


def single_seconds(network: pool.LocalPool, folder: Path, numbers: Sequence[int]) -> list[float]:
    """Seconds of the network for each of some pairs, one at a time, in a thread of its own as in a batch."""
    seconds = []
    for index in numbers:
        depth = io.read_depth(folder / f"depths/{index:05}.png")
        guide = io.read_guide(folder / f"guides/{index:05}.jpg")
        seconds.append(network.infer(depth.depth, guide, depth.valid, False).seconds)
    return seconds


def start(folder: Path, out: str, *arguments: str) -> subprocess.Popen[str]:
    """Begin a batch of the folder."""
    command = [sys.executable, "-m", "ddfup", "batch", "depths", "guides", out, "--json", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    with (folder / f"{out}.log").open("a") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)


def records(child: subprocess.Popen[str]) -> Iterator[dict[str, object]]:
    """What a batch prints, as it comes; a line that a kill has cut is left out."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.endswith("}\n"):
            yield json.loads(line)


def resident_mib(pid: int) -> float:
    """Memory of a process just now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def tree(folder: Path) -> dict[str, str]:
    """Hash of every file of an output folder, but not of the batch's own state."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".ddfup" not in path.relative_to(folder).parts
    }


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Time and memory of the batch against the network alone."""
    import torch

    from ddfup.inference import Upsampler

    network = pool.LocalPool(Upsampler(options.model, device=options.device))
    numbers = [index * options.pairs // options.singles for index in range(options.singles)]
    for _ in range(3):
        single_seconds(network, folder, numbers[:1])
    seconds = single_seconds(network, folder, numbers[::2])
    begin = time.perf_counter()
    child = start(folder, "clean", "--model", options.model, "--device", options.device, "-v")
    ends, memory = [], []
    with child:
        for record in records(child):
            assert record["status"] == "ok", record
            ends.append(time.perf_counter())
            if len(ends) * TENTHS // options.pairs > len(memory):
                memory.append(resident_mib(child.pid))
    whole = time.perf_counter() - begin
    assert child.returncode == 0 and len(ends) == options.pairs, (folder / "clean.log").read_text()
    seconds += single_seconds(network, folder, numbers[1::2])
    network.close()
    alone = statistics.fmean(seconds) * options.pairs
    # The first pair ends when the network is loaded and warm.
    steady = (ends[-1] - ends[0]) * options.pairs / (options.pairs - 1)
    print_table(
        ["", "s", "pairs/s", "efficiency"],
        [
            [f"the network alone, x {options.pairs}", f"{alone:.1f}", f"{options.pairs / alone:.2f}", "100.0 %"],
            ["batch, first to last pair", f"{steady:.1f}", f"{options.pairs / steady:.2f}", f"{alone / steady:.1%}"],
            ["batch, whole command", f"{whole:.1f}", f"{options.pairs / whole:.2f}", f"{alone / whole:.1%}"],
        ],
    )
    print(f"threads of PyTorch: {torch.get_num_threads()}; cores: {len(os.sched_getaffinity(0))}")
    print("memory of the batch after each tenth, MiB: " + " ".join(f"{value:.0f}" for value in memory))
    print((folder / "clean.log").read_text().splitlines()[-1])


def kill(folder: Path, options: argparse.Namespace) -> None:
    """Kill the batch at random moments, finish it, and compare."""
    moments = random.Random(options.seed)
    arguments = ("--model", options.model, "--device", options.device)
    # So that the kills are spread over the work and none is left without something to hit.
    share = options.pairs // (options.kills + 1)
    hits, done = [], 0
    while len(hits) < options.kills:
        child = start(folder, "killed", *arguments)
        fresh, most = 0, moments.randint(1, max(1, share))
        with child:
            for record in records(child):
                fresh += record["status"] == "ok"
                if fresh == most:
                    time.sleep(moments.uniform(0, 0.1))
                    child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL, (folder / "killed.log").read_text()
        done = sum(not name.endswith(".tmp") for name in tree(folder / "killed"))
        hits.append(done)
    with start(folder, "killed", *arguments) as child:
        last = [record["status"] for record in records(child)]
    assert child.returncode == 0
    same = tree(folder / "clean") == tree(folder / "killed")
    print(f"{len(hits)} kills, after which there were {' '.join(map(str, hits))} outputs")
    print(f"the last run made {last.count('ok')} and found {last.count('skipped')} done; as the clean run: {same}")
    assert same


def ray_workers(pid: int) -> list[int]:
    """Process numbers of the Ray workers that belong to a batch."""
    parents, workers = {}, []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            # The name, in brackets, may hold anything.
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if (path / "cmdline").read_bytes().startswith(b"ray::Worker"):
                workers.append(int(path.name))
        except OSError:
            continue  # it has just ended

    def is_below(process: int) -> bool:
        while process > 1 and process != pid:
            process = parents.get(process, 0)
        return process == pid

    return [worker for worker in workers if is_below(worker)]


def run_on_ray(folder: Path, options: argparse.Namespace) -> None:
    """The same on a Ray cluster with more CPUs than there are, and a worker killed in mid-run."""
    arguments = ("--model", options.model, "--device", options.device, "--engine", "ray")
    begin = time.perf_counter()
    killed, statuses = 0, []
    with start(folder, "ray", *arguments, "--workers", str(options.ray_workers)) as child:
        for record in records(child):
            statuses.append(record["status"])
            if not killed and len(statuses) >= options.pairs // 3:
                killed = random.Random(options.seed).choice(ray_workers(child.pid))
                os.kill(killed, signal.SIGKILL)
    seconds = time.perf_counter() - begin
    same = tree(folder / "clean") == tree(folder / "ray")
    print(f"Ray, {options.ray_workers} workers on {os.cpu_count()} cores, one killed after {options.pairs // 3} pairs:")
    print((folder / "ray.log").read_text().strip())
    print(f"{statuses.count('ok')} of {options.pairs} ok in {seconds:.1f} s; as the clean run: {same}")
    assert killed and same and child.returncode == 0


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--singles", type=int, default=200, help="pairs that the network does alone, half at each end")
    parser.add_argument("--size", default="256x192", help="of the guides")
    parser.add_argument("--ratio", type=int, default=4)
    parser.add_argument("--model", default="base")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--ray-workers", type=int, default=2 * (os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--folder", type=Path, help="keep files here; a clean run found there is not repeated")
    options = parser.parse_args()
    options.singles = min(options.singles, options.pairs)
    with tempfile.TemporaryDirectory(prefix="ddfup-overlap-") as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "depths").is_dir():
            write_pairs(folder, options.pairs, io.parse_size(options.size), options.ratio)
        if not (folder / "clean").is_dir():
            measure(folder, options)
        if options.kills:
            shutil.rmtree(folder / "killed", ignore_errors=True)
            kill(folder, options)
        if options.ray:
            shutil.rmtree(folder / "ray", ignore_errors=True)
            run_on_ray(folder, options)


if __name__ == "__main__":
    main()
