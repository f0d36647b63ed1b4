"""The arrows between modules, read from the source: they go down only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ddfup

PACKAGE = Path(ddfup.__file__).resolve().parent

# Each module (or package, with all in it) and what of ddfup it may import. Everything may import LEAVES.
LEAVES = {"errors", "_memory", "_resources", "_shared", "_stderr"}
ARROWS = {
    "cli": {
        "",
        "commands",
        "terminal",
    },
    "__main__": {"cli"},
    "commands": {
        "",
        "options",
        "terminal",
        "demo",
        "pair",
        "batch",
        "pointcloud",
        "info",
        "inference",
        "models",
        "io",
        "writing",
        "report",
        "ops.native",
        "training",
        "configs",
        "benchmark",
        "speed",
        "export",
        "metrics",
        "signals",
    },
    "options": set(),
    "terminal": set(),
    "demo": {"inference", "io", "writing", "degrade", "metrics", "preview"},
    "batch": {"", "inference", "io", "writing", "pair", "preview", "signals"},
    "pair": {"inference", "io", "writing", "preview", "pointcloud"},
    "pointcloud": set(),
    "info": {"io", "writing", "preview"},
    "benchmark": {"inference", "io", "writing", "degrade", "metrics", "tables"},
    "speed": {"", "export", "inference", "models", "devices", "io", "writing", "ops", "ops.native"},
    "export": {"", "models", "ops", "ops.compilers", "io", "writing"},
    "report": {"guides", "io", "writing", "metrics", "preview", "tables"},
    "training": {
        "configs",
        "models",
        "devices",
        "graphs",
        "guides",
        "io",
        "degrade",
        "metrics",
        "ops.native",
        "writing",
    },
    "configs": set(),
    "inference": {"inputs", "models", "devices", "graphs", "tiling", "sizes", "ops.native"},
    "inputs": set(),
    "graphs": {"devices"},
    "models": {"ops", "tiling"},
    "tiling": set(),
    "devices": set(),
    "sizes": set(),
    "ops": set(),
    "ops.native": {"ops.cache", "ops.compilers"},
    "ops.cache": set(),
    "ops.compilers": set(),
    "preview": set(),
    "io": {"formats", "guides", "sizes", "units"},
    "guides": {"formats"},
    "formats": set(),
    "units": set(),
    "signals": set(),
    "tables": set(),
    "writing": set(),
    "degrade": set(),
    "metrics": set(),
    "": set(),
    "errors": set(),
    "_memory": set(),
    "_resources": set(),
    "_shared": set(),
    "_stderr": set(),
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES} | {""}


def room_of(module):
    """The row of ARROWS that a module belongs to: its own, or that of the package it is in."""
    while module not in ARROWS and "." in module:
        module = module.rpartition(".")[0]
    return module


def imports(path):
    """Every module of ddfup that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # `from ddfup.ops import native` is about ddfup.ops.native, not about ddfup.ops.
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name for name in below if name.removeprefix("ddfup.") in MODULES]
            names += [node.module] if len(names) < len(below) else []
        else:
            continue
        for name in names:
            if name == "ddfup" or (name.startswith("ddfup.") and name[6:] in MODULES):
                yield name.removeprefix("ddfup").removeprefix(".")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_arrows_go_down(path):
    room = room_of(module_of(path))
    assert room in ARROWS, f"{path} has no room: add it to ARROWS"
    for target in imports(path):
        goal = room_of(target)
        # A package is one room: what is in it may use its neighbours.
        allowed = goal == room or goal in LEAVES or target in ARROWS[room] or goal in ARROWS[room]
        allowed = allowed or (goal.partition(".")[0] == room)
        assert allowed, f"ddfup.{module_of(path)} must not import ddfup.{target}"


def test_the_table_has_no_cycle_and_no_old_rows():
    assert set(ARROWS) <= MODULES | {"configs"}
    done: set[str] = set()
    while rest := set(ARROWS) - done:
        free = {room for room in rest if ARROWS[room] <= done}
        assert free, f"cycle among {rest}"
        done |= free


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_the_command_line_prints(path):
    if room_of(module_of(path)) in ("cli", "commands", "terminal"):
        pytest.skip("one of those that may")
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "input"), f"{where} prints"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            assert name not in ("sys.stdout", "sys.stderr", "typer.echo", "typer.secho"), f"{where} prints"


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("ops", {"numpy", "PIL", "cv2", "safetensors", "typer", "rich"}),
        ("models", {"PIL", "cv2", "tifffile", "imagecodecs", "typer", "rich"}),
        ("io.py", {"torch", "typer", "rich"}),
        ("formats", {"torch", "typer", "rich"}),
        ("units.py", {"torch", "typer", "rich"}),
        ("guides.py", {"torch", "typer", "rich"}),
        ("metrics.py", {"torch", "typer", "rich"}),
        ("preview.py", {"torch", "typer", "rich"}),
        ("pair.py", {"torch", "typer", "rich"}),
    ],
)
def test_rooms_know_only_their_trade(folder, forbidden):
    place = PACKAGE / folder
    for path in [place] if place.is_file() else place.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                assert name.partition(".")[0] not in forbidden, f"{path} imports {name}"


@pytest.mark.parametrize(
    "statement", ["import ddfup", "import ddfup.cli", "import ddfup.cli as c; assert c.main(['--help']) == 0"]
)
def test_torch_is_loaded_late(statement):
    code = f"import sys; {statement}; sys.exit('torch' in sys.modules)"
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
