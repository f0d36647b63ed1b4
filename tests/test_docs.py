"""Every command and Python example in the documentation is run, in a folder with stand-ins for the user's files."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
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
    for folder in ("depths", "photos", "results", "truth"):
        (root / folder).mkdir()
    for name in ("one", "two"):
        shutil.copy(root / "depth.png", root / "depths" / f"{name}.png")
        shutil.copy(root / "photo.jpg", root / "photos" / f"{name}.jpg")
        Image.fromarray((1000 * depth).astype(np.uint16)).save(root / "truth" / f"{name}.png")
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
def test_python_of_a_page_runs(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {"__name__": "example"})


def test_the_pages_have_commands_and_the_install_is_that_of_ci():
    readme = CHECKOUT / "README.md"
    assert len(list(commands(readme))) > 8 and blocks(readme, "python")
    ci = (CHECKOUT / ".ci" / "run").read_text("utf-8")
    installs = [command for command in commands(readme) if command.startswith("pip install")]
    assert len(installs) == 2
    for command in installs:
        assert command.replace("pip install", "pip install --quiet") in ci, f".ci/run does not do {command!r}"
