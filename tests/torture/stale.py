"""P5: what is served is what the inputs, weights and options of now give."""

import random
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from torture import batches
from torture.batches import tree
from torture.stand_in import call, nearest
from torture.table import verdict


def p5(counts, folder):
    """Nothing stale is served."""
    batches.write_scene(folder, 6, kinds=batches.ALL_FORMATS)
    generator = random.Random(counts.seed)
    weights, options = "5eed", []
    with nearest(weights):
        assert call(folder, "batch", "depths", "guides", "out").code == 0
    choices = ("pixel", "guide", "weights", "option", "output", "nothing")
    faults, kinds = [], dict.fromkeys(choices, 0)
    for number in range(counts.changes):
        kind = choices[number % len(choices)]
        kinds[kind] += 1
        every = sorted(p for p in (folder / "depths").rglob("*") if p.is_file())
        depth = generator.choice(every)
        expected = {"nothing": set()}.get(kind, {depth.relative_to(folder / "depths").as_posix()})
        if kind == "pixel":
            _change_pixel(depth, generator)
        elif kind == "guide":
            guide = (folder / "guides" / depth.relative_to(folder / "depths")).with_suffix(".jpg")
            pixels = np.array(Image.open(guide))
            pixels[generator.randrange(24), generator.randrange(32)] ^= 255
            Image.fromarray(pixels).save(guide, quality=95)
        elif kind == "output":
            target = folder / "out" / depth.relative_to(folder / "depths")
            data = bytearray(target.read_bytes())
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            target.write_bytes(bytes(data))
        elif kind in ("weights", "option"):
            expected = {path.relative_to(folder / "depths").as_posix() for path in every}
            if kind == "weights":
                weights = f"{generator.getrandbits(128):032x}"
            else:
                number = generator.randrange(1, 10**6)
                options = generator.choice(
                    (
                        ["--invalid", f"0,{number}"],
                        ["--unit", str(number)],
                        ["--tile", str(number)],
                        ["--precision", "bf16"],
                    )
                )
        with nearest(weights):
            result = call(folder, "batch", "depths", "guides", "out", "--json", *options)
        remade = {Path(r["out"]).relative_to("out").as_posix() for r in result.records if r["status"] == "ok"}
        # An option may be the one that was there before: then nothing is to be done.
        if result.code != 0 or (remade != expected and not (kind == "option" and not remade)):
            faults.append(f"{kind}: {sorted(remade)} remade, not {sorted(expected)}; {result.err}")
        with tempfile.TemporaryDirectory() as clean, nearest(weights):
            call(folder, "batch", "depths", "guides", clean, *options)
            if tree(Path(clean), hidden=False) != tree(folder / "out", hidden=False):
                faults.append(f"{kind}: not what a clean run gives")
    done = f"{counts.changes} changes: " + ", ".join(kind for kind in kinds)
    right = counts.changes - len(faults)
    yield verdict("P5", done, f"{right / counts.changes:.0%} remade exactly, as a clean run", faults)


def _change_pixel(path, generator):
    """Change one value by one step, by code that is not ours."""
    from depth_files import exr, npz, pfm

    from ddfup import io

    values = np.array(io.read_stored(path)[2])
    row, column = generator.randrange(values.shape[0]), generator.randrange(values.shape[1])
    if values.dtype.kind == "f":
        values[row, column] = np.nextafter(values[row, column], np.float32(99))
    else:
        values[row, column] += 1
    if path.suffix == ".png":
        Image.fromarray(values).save(path)
    elif path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".tif":
        import tifffile

        tifffile.imwrite(path, values)
    else:
        make = {".exr": lambda: exr({"Z": values}), ".pfm": lambda: pfm(values), ".npz": lambda: npz(depth=values)}
        path.write_bytes(make[path.suffix]())
