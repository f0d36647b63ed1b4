"""How long `ddfup report` takes and how large its page gets, for a few pairs and for many.

Run from the checkout: ``python benchmarks/report_pages.py DATASET [--pairs 30,1000]``, where DATASET has ``rgb/`` and
``depth/`` of equal stems. The predictions are eight times smaller depth, enlarged again. Each report is a process of
its own; CPU time changes less than time where other work runs. The page is then opened in Chromium, where there is
one, and waited for until its images are in order.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np

from ddfup import io
from ddfup.benchmark.run import Pair, find_pairs
from ddfup.terminal import print_table

CHECKOUT = Path(__file__).resolve().parents[1]
RATIO = 8
MOST_BYTES = 20_000_000


def prepare(pairs: list[Pair], count: int, root: Path) -> None:
    """Fill pred/, gt/, low/ and guides/ with so many pairs, the same ones again if there are too few."""
    for name in ("pred", "gt", "low", "guides"):
        (root / name).mkdir(parents=True)
    for number in range(count):
        pair, stem = pairs[number % len(pairs)], f"{number:05d}"
        if number >= len(pairs):
            source = f"{number % len(pairs):05d}"
            for name in ("pred", "gt", "low", "guides"):
                old = next((root / name).glob(f"{source}.*"))
                os.link(old, root / name / f"{stem}{old.suffix}")
            continue
        truth = io.read_depth(pair.depth).depth
        small = (max(1, truth.shape[1] // RATIO), max(1, truth.shape[0] // RATIO))
        low = cv2.resize(np.nan_to_num(truth), small, interpolation=cv2.INTER_NEAREST)
        guess = cv2.resize(low, truth.shape[::-1], interpolation=cv2.INTER_LINEAR)
        for name, depth in (("pred", guess), ("low", low)):
            cv2.imwrite(str(root / name / f"{stem}.png"), np.round(1000 * depth).astype(np.uint16))
        for name, source_file in (("gt", pair.depth), ("guides", pair.guide)):
            shutil.copyfile(source_file, root / name / f"{stem}{source_file.suffix}")


def report(root: Path) -> tuple[float, float, float]:
    """Run the command; return seconds, CPU seconds and peak memory in bytes."""
    command = [sys.executable, "-m", "ddfup", "report", str(root / "pred"), str(root / "gt"), "-q"]
    command += ["--guides", str(root / "guides"), "--inputs", str(root / "low"), "-o", str(root / "out")]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        raise SystemExit("ddfup report failed")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def open_page(page: Path) -> float | None:
    """Return the CPU seconds of Chromium's main thread until the page is ready, or None without Chromium."""
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not program or not driver:
        return None
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    browser = webdriver.Chrome(service=Service(driver), options=options)
    try:
        browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        browser.get(page.as_uri())
        browser.execute_script("return document.querySelectorAll('.card:not([hidden])').length")
        figures = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return next(float(figure["value"]) for figure in figures if figure["name"] == "TaskDuration")
    finally:
        browser.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--pairs", default=[30, 1000], type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("-o", "--out", type=Path, help="keep the reports below this folder")
    options = parser.parse_args()
    found = find_pairs(options.dataset)
    rows, too_large = [], False
    with tempfile.TemporaryDirectory() as temporary:
        for count in options.pairs:
            root = (options.out or Path(temporary)) / str(count)
            prepare(found, count, root)
            seconds, busy, memory = report(root)
            page = root / "out" / "report.html"
            size = page.stat().st_size
            beside = sum(file.stat().st_size for file in (root / "out" / "report_images").iterdir())
            opened = open_page(page)
            too_large |= size >= MOST_BYTES
            rows.append(
                [
                    str(count),
                    f"{seconds:.1f} s",
                    f"{busy:.1f} s",
                    f"{1000 * busy / count:.0f} ms",
                    f"{memory / 1e6:.0f} MB",
                    f"{size / 1e6:.1f} MB",
                    f"{beside / 1e6:.0f} MB",
                    "-" if opened is None else f"{opened:.1f} s",
                ]
            )
    print_table(
        ["pairs", "time", "CPU time", "CPU per pair", "memory", "page", "pictures beside it", "CPU to open"], rows
    )
    if too_large:
        raise SystemExit(f"a page must be below {MOST_BYTES / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
