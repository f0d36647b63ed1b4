"""Every command and Python example in the documentation is run, in a folder with stand-ins for the user's files."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from stand_ins import cluster

import ddfup

sys.path.insert(0, str(Path(__file__).with_name("training")))
from sets import CONFIG, write_data

CHECKOUT = Path(ddfup.__file__).resolve().parent.parent
PAGES = [path for path in (CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md"))) if path.is_file()]
# What .ci/run itself does, with a virtual environment of its own.
INSTALLING = ("pip install", "pytest")
# Pages that need more than files: what gives it to them.
SURROUNDINGS = {"cluster.md": cluster}


def blocks(page, language):
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(page):
    """The commands of a page, without their comments; continued lines are joined."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.sub(r"(^|\s)#.*", "", line).split(" && "):
                if command.strip():
                    yield command.strip()


def write_sensors(root, small, depth):
    """Write what the pages' sensors deliver: the small map (metres, 0 = hole) as each of them stores it."""
    millimetres, photo = np.rint(1000 * small).astype(np.uint16), root / "photo.jpg"
    # ARKit, Record3D, and a recording of frames.
    lidar = cv2.resize(depth, (256, 192), interpolation=cv2.INTER_NEAREST)
    levels = np.full(lidar.shape, 2, np.uint8)
    levels[:8, :8], levels[8:16] = 0, 1
    (root / "0.depth").write_bytes(imagecodecs.lzfse_encode(lidar.astype("<f4").tobytes()))
    (root / "0.conf").write_bytes(imagecodecs.lzfse_encode(levels.tobytes()))
    (root / "take").mkdir()
    for suffix in (".depth", ".conf"):
        shutil.copy(root / f"0{suffix}", root / "take" / f"0{suffix}")
    shutil.copy(photo, root / "take" / "0.jpg")
    (root / "camera.json").write_text('{"fx": 400, "fy": 400, "cx": 239.5, "cy": 179.5}')
    # RealSense.
    Image.fromarray(np.rint(10_000 * small).astype(np.uint16)).save(root / "d405.png")
    Image.fromarray(np.rint(1000 * depth).astype(np.uint16)).save(root / "aligned.png")
    cv2.resize(millimetres, (640, 480), interpolation=cv2.INTER_NEAREST).tofile(root / "snapshot_Depth.raw")
    Image.open(photo).resize((640, 480)).save(root / "color.jpg")
    # Kinects.
    Image.fromarray((millimetres << 3) | (millimetres >> 13)).save(root / "sun.png")
    # Disparity, of a matcher and of a network.
    disparity = np.where(small > 0, 420 * 0.12 / np.maximum(small, 0.1), np.inf).astype(np.float32)
    assert cv2.imwrite(str(root / "disparity.pfm"), disparity)
    np.save(root / "disparity.npy", disparity)
    np.save(root / "sgbm.npy", np.where(small > 0, 16 * disparity, -16).astype(np.int16))
    np.save(root / "relative.npy", np.nan_to_num(disparity / 50, posinf=0))
    np.savez_compressed(root / "metric.npz", depth=small)
    shutil.copy(photo, root / "left.jpg")
    frames = {"scan": ("000000", "000000"), "tum": ("1305031102.160407", "1305031102.175304")}
    for name, (depth_stem, photo_stem) in frames.items():
        for kind in ("depth", "rgb", "confidence"):
            (root / name / kind).mkdir(parents=True)
        Image.fromarray(millimetres * (5 if name == "tum" else 1)).save(root / name / "depth" / f"{depth_stem}.png")
        shutil.copy(photo, root / name / "rgb" / f"{photo_stem}.jpg")
        marks = cv2.resize(levels, small.shape[::-1], interpolation=cv2.INTER_NEAREST)
        Image.fromarray(marks).save(root / name / "confidence" / f"{depth_stem}.png")
    # Middlebury's layout: grey levels.
    for kind, picture in (("rgb", Image.open(photo)), ("depth", Image.fromarray((60 * depth).astype(np.uint8)))):
        (root / "middlebury" / kind).mkdir(parents=True)
        picture.resize((240, 180), Image.Resampling.NEAREST).save(root / "middlebury" / kind / "art.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the pages name."""
    root = tmp_path_factory.mktemp("user")
    y, x = np.mgrid[0:360, 0:480] / 360
    edge = x + 0.2 * np.sin(5 * y) > 0.7
    depth = np.where(edge, 1.2 + 0.2 * y, 3.0 + 0.3 * x).astype(np.float32)
    photo = np.where(edge[..., None], [200, 150, 90], [60, 90, 120]).astype(np.uint8)
    Image.fromarray(photo).save(root / "photo.jpg")
    small = cv2.resize(depth, (64, 48), interpolation=cv2.INTER_NEAREST)
    small[4, 5] = 0
    Image.fromarray((1000 * small).astype(np.uint16)).save(root / "depth.png")
    tifffile.imwrite(root / "lidar.tiff", small)
    for folder in ("depths", "photos", "results", "ours", "others", "truth"):
        (root / folder).mkdir()
    for index, name in enumerate(("one", "two")):
        for place in ("ours", "others"):
            noise = np.random.default_rng(index).normal(0, 0.002 if place == "ours" else 0.01, depth.shape)
            Image.fromarray((1000 * (depth + noise)).astype(np.uint16)).save(root / place / f"{name}.png")
        shutil.copy(root / "depth.png", root / "depths" / f"{name}.png")
        shutil.copy(root / "photo.jpg", root / "photos" / f"{name}.jpg")
        Image.fromarray((1000 * depth).astype(np.uint16)).save(root / "truth" / f"{name}.png")
    write_sensors(root, small, depth)
    write_data(root / "datasets")
    (root / "mine.toml").write_text(CONFIG)
    programs = root / "bin"
    programs.mkdir()
    for name, module in (("ddfup", "ddfup"), ("torchrun", "torch.distributed.run"), ("python", "")):
        run = f"-m {module}" if module else ""
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {run} "$@"\n')
        (programs / name).chmod(0o755)
    return root


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_of_a_page_run(page, folder, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(folder, work)
    environment = {
        **os.environ,
        "PATH": f"{work / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(CHECKOUT),
        "OMP_NUM_THREADS": "2",
    }
    names = {} if torch.cuda.is_available() else {"--device cuda": "--device cpu"}
    with contextlib.ExitStack() as stack:
        if page.name in SURROUNDINGS:
            environment, more = stack.enter_context(SURROUNDINGS[page.name](work, environment))
            names |= more
        for command in commands(page):
            if command.startswith(INSTALLING):
                continue
            for shown, meant in names.items():
                command = command.replace(shown, meant)
            done = subprocess.run(
                ["bash", "-c", command], cwd=work, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_of_a_page_runs(page, folder, tmp_path, monkeypatch):
    work = tmp_path / "work"
    shutil.copytree(folder, work)
    monkeypatch.chdir(work)
    ran = 0
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {"__name__": "example"})
        ran += 1
    assert ran == page.read_text("utf-8").count("```python\n")


def test_the_pages_have_commands_and_the_install_is_that_of_ci():
    readme = CHECKOUT / "README.md"
    assert len(list(commands(readme))) > 8 and blocks(readme, "python")
    ci = (CHECKOUT / ".ci" / "run").read_text("utf-8")
    installs = [command for command in commands(readme) if command.startswith("pip install")]
    assert len(installs) == 2
    for command in installs:
        assert command.replace("pip install", "pip install --quiet") in ci, f".ci/run does not do {command!r}"


def links(page):
    """The files that a page links to."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not target.startswith(("http", "#")):
            yield (page.parent / target.partition("#")[0]).resolve()


def test_every_page_is_found_from_the_readme_and_no_link_is_dead():
    readme, index = CHECKOUT / "README.md", CHECKOUT / "docs" / "index.md"
    assert index in links(readme)
    assert {*links(readme), *links(index)} >= {page for page in PAGES if page.parent == index.parent}
    for page in PAGES:
        for target in links(page):
            assert target.exists(), f"{page.name} links to {target}"
