"""Where is written and where not: P2 inputs never change, P9 nothing outside the output folder."""

import json
import random
import shutil

import numpy as np
from PIL import Image

from torture import batches, catalogue
from torture.stand_in import call, nearest
from torture.table import verdict


def _facts(folder):
    """Content, time and mode of every file and link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[path.relative_to(folder).as_posix()] = (
            content,
            status.st_mode,
            status.st_mtime_ns if path.is_file() else 0,
        )
    return found


def p2(counts, folder):
    """Inputs never change."""
    over = "--overwrite"
    single = ("upsample", "depths/a.png", "guides/a.jpg", over, "-o")
    batch = ("batch", "depths", "guides")
    commands = [
        *((*single, out) for out in ("depths/a.png", "depths/../depths/a.png", "soft.png", "hard.png", "loop/a.png")),
        (*single, "r.png", "--preview", "guides/a.jpg"),
        (*single, "r.png", "--preview", "softguide.jpg"),
        (*single, "r.png", "--pointcloud", "cloudlink.ply", "--fov", "60"),
        ("upsample", "depths/a.png", "guides/a.jpg"),
        ("upsample", "depths/a.png", "guides/a.jpg", "--confidence", "conf.png", over, "-o", "conf.png"),
        *((*batch, out, *more) for out in ("depths", "guides", "loop", ".", "out") for more in ((), (over,))),
        (*batch, "out", "--preview", "guides", over),
        (*batch, "out", "--preview", "depths", over),
        (*batch, "depths", "--format", "npy"),
        ("batch", "--manifest", "list.csv", "depths", over),
        ("batch", "--manifest", "list.csv", ".", over),
        ("info", "depths/a.png"),
        ("report", "depths", "depths", "-o", "depths", over),
        ("report", "depths", "depths", "-o", "out", over),
        ("report", "depths/a.png", "depths/a.png", "-o", "guides", over),
    ]
    faults = []
    for number, command in enumerate(commands):
        home = folder / str(number)
        batches.write_pair(home, "a")
        batches.write_pair(home, "b/c")
        Image.fromarray(np.ones((6, 8), np.uint8)).save(home / "conf.png")
        row = "depths/a.png,guides/a.jpg"
        (home / "list.csv").write_text(f"depth,guide,out\n{row},a.png\n{row},depths/a.png\n")
        (home / "soft.png").symlink_to("depths/a.png")
        (home / "softguide.jpg").symlink_to("guides/a.jpg")
        (home / "cloudlink.ply").symlink_to("depths/a.png")
        (home / "hard.png").hardlink_to(home / "depths/a.png")
        (home / "loop").symlink_to("depths")
        before = _facts(home)
        with nearest():
            result = call(home, *command)
        after = _facts(home)
        changed = [name for name in before if after.get(name) != before[name]]
        if changed or "internal error" in result.err:
            faults.append(f"{' '.join(command)}: changed {changed}; {result.err}")
    done = f"{len(commands)} commands with out == in, links, loops"
    yield verdict("P2", done, f"{len(faults)} changed an input (bytes, time, mode)", faults)


_PARTS = (
    "..",
    ".",
    "",
    "a",
    "link",
    "loop",
    "x.png",
    "y.npy",
    "~",
    "C:",
    "\\..\\..",
    "a\0b",
    "%2e%2e",
    "‥",
    "\udcff",
    ".ddfup",
    "a" * 300,
)


def p9(counts, folder):
    """Nothing is written outside the output folder."""
    generator = random.Random(counts.seed)
    faults, written = [], 0
    rounds = max(1, counts.rows // 50)
    for number in range(rounds):
        root = folder / str(number)
        home = root / "home"
        (home / "out").mkdir(parents=True)
        (root / "outside").mkdir()
        catalogue.lay(home)
        # Links out of the folder, and out of it by a detour.
        (home / "out/link").symlink_to(root / "outside")
        (home / "out/loop").symlink_to("loop")
        (home / "out/x.png").symlink_to(root / "outside/x.png")
        (home / "out/a").mkdir()
        (home / "out/a/link").symlink_to("../../..")
        (home / "out/a/y.npy").symlink_to(home / "depth.png")
        if number % 10 == 9:
            shutil.rmtree(home / "out")
            (home / "out").mkdir()
            (home / "out/.ddfup").symlink_to(root / "outside")
        rows = []
        for index in range(50):
            parts = [generator.choice(_PARTS) for _ in range(generator.randrange(1, 5))]
            if generator.random() < 0.8:
                # Nearly a good name, of its own.
                parts.append(f"{index}.{generator.choice(('png', 'npy', 'tif', 'PNG', 'png/', 'png.', 'exe'))}")
            out = "/".join(parts)
            if generator.random() < 0.1:
                out = f"{root}/outside/{index}.png"
            rows.append({"depth": "depth.png", "guide": "guide.jpg", "out": out})
        (home / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        before = _outside(root)
        more = generator.choice(((), ("--overwrite",), ("--preview", "out/look"), ("--skip-existing",)))
        with nearest():
            result = call(home, "batch", "--manifest", "list.jsonl", "out", "--json", *more)
        after = _outside(root)
        written += sum(record["status"] == "ok" for record in result.records)
        if after != before or "internal error" in result.err or result.code not in (0, 3, 4, 5, 6):
            news = set(after.items()) ^ set(before.items())
            faults.append(f"round {number}: {sorted(map(str, news))[:3]}; {result.code} {result.err[-300:]}")
        shutil.rmtree(root)
    if not written:
        faults.append("no row was written at all")
    done = f"{50 * rounds} manifest rows (.., absolute, NUL, links, loops)"
    yield verdict("P9", done, f"{len(faults)} files outside; {written} rows inside written", faults)


def _outside(root):
    """Everything but what is really below the output folder."""
    inside = root / "home/out"
    return {
        str(path): (str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder")
        for path in root.rglob("*")
        if path != inside and inside not in path.parents
    }
