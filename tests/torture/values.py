"""Numbers: P10 units survive, P11 invalid stays invalid, P15 tiles and devices agree."""

import random
from pathlib import Path

import numpy as np
from PIL import Image

from torture.stand_in import call
from torture.table import Line, verdict


def p10(counts, folder):
    """Units survive."""
    from torture import round_trips

    faults, values, most, combinations = [], 0, 0.0, 0
    for name, dtype in round_trips.TABLE:
        for unit in round_trips.units_of(dtype):
            errors = round_trips.measure(name, dtype, unit, counts.values, folder, seed=counts.seed)
            combinations += 1
            values, most = values + errors.values, max(most, errors.stored)
            if not errors.fine:
                faults.append(f"{name} {dtype} {unit.name}: {errors}")
    figure = f"at most {most:.3f} steps"
    yield verdict("P10", f"{values} values, {combinations} of format x type x unit", figure, faults)
    generator, wrapped, refused, tries = random.Random(counts.seed), [], 0, 0
    for name, dtype in round_trips.TABLE:
        if dtype.kind == "f" or dtype.itemsize > 4:
            continue
        for unit in round_trips.units_of(dtype):
            for _ in range(max(2, counts.values // 100)):
                from ddfup import io

                excess = generator.choice(
                    (generator.uniform(0, 1e-4), generator.uniform(0, 10), 10 ** generator.uniform(0, 5))
                )
                value = np.float32(io.limits(dtype, unit)[1] * (1 + excess))
                tries += 1
                try:
                    was_refused, error = round_trips.beyond(name, dtype, unit, value, folder)
                except AssertionError as problem:
                    wrapped.append(str(problem))
                    continue
                refused += was_refused
                if error > 0.5:
                    wrapped.append(f"{name} {dtype} {unit.name}: {value} is {error} steps off")
    yield Line(
        "P10", f"{tries} values beyond what is held", f"{refused} refused, {len(wrapped)} wrapped", not wrapped, wrapped
    )


def p11(counts, folder):
    """Invalid stays invalid unless --fill."""
    from networks import tiny_pyramid

    from ddfup import io, models

    folder.mkdir(exist_ok=True)
    models.save_weights(folder / "w.safetensors", tiny_pyramid(), architecture="pyramid", name="w", description="tried")
    generator = np.random.default_rng(counts.seed)
    faults, tries, holes = [], max(4, counts.values // 40), 0
    for number in range(tries):
        low = tuple(int(side) for side in generator.integers(1, 24, 2))
        factor = int(generator.integers(1, 6))
        values = generator.uniform(1, 5, low)
        invalid = generator.random(low) < generator.choice((0.1, 0.5, 0.95))
        invalid.flat[generator.integers(invalid.size)] = False
        kind = ("png", "npy", "tif", "exr")[number % 4]
        marked = np.where(
            invalid, generator.choice([0.0] if kind == "png" else [0.0, np.nan, np.inf, -1.0], low), values
        )
        path = folder / f"d.{kind}"
        _write_depth(path, marked)
        Image.fromarray(generator.integers(0, 255, (low[0] * factor, low[1] * factor, 3), dtype=np.uint8)).save(
            folder / "g.png"
        )
        expected = np.repeat(np.repeat(~invalid, factor, 0), factor, 1)
        for fill in (False, True):
            command = ("upsample", path.name, "g.png", "-o", f"r.{kind}", "--model", "w.safetensors", "--device", "cpu")
            result = call(folder, *command, "--overwrite", *(["--fill"] if fill else []))
            if result.code:
                faults.append(result.err)
                continue
            valid = io.read_depth(folder / f"r.{kind}", unit=io.UNITS["disparity"] if kind != "png" else None).valid
            holes += int((~expected).sum())
            if not np.array_equal(valid, expected | fill):
                faults.append(f"{kind} {low} x{factor}, fill {fill}: {(valid != (expected | fill)).sum()} pixels")
    done = f"{2 * tries} runs of a network, 4 formats, with and without --fill"
    yield verdict("P11", done, f"{holes} hole pixels; {len(faults)} runs wrong", faults)


def _write_depth(path, values):
    import tifffile
    from depth_files import exr

    if path.suffix == ".png":
        Image.fromarray((values * 1000).astype(np.uint16)).save(path)
    elif path.suffix == ".npy":
        np.save(path, values.astype(np.float32))
    elif path.suffix == ".tif":
        tifffile.imwrite(path, values.astype(np.float32))
    else:
        path.write_bytes(exr({"Z": values.astype(np.float32)}))


def p15(counts, folder):
    """CPU equals CUDA, tiled equals whole."""
    import torch

    from ddfup.inference import Upsampler

    generator = np.random.default_rng(counts.seed)
    # Low-resolution size, ratio, and a side of tiles that is larger than two halos and smaller than the picture.
    trials = [((96, 128), 3, 200), ((120, 160), 4, 300), ((60, 80), 8, 400)]
    model = "base"
    if counts.values < 1000:
        trials, model = [((64, 80), 2, 100)], _tiny(folder)
    worst = 0.0
    for low, ratio, side in trials:
        depth, guide = _scene(generator, low, ratio)
        whole = Upsampler(model, device="cpu", tile="none")(depth, guide, fill=True)
        tiled = Upsampler(model, device="cpu", tile=side)(depth, guide, fill=True)
        worst = max(worst, float(np.max(np.abs(tiled - whole) / np.abs(whole))))
    done = f"tiles against whole, {len(trials)} sizes and ratios, {Path(model).stem}"
    yield Line("P15", done, f"{worst:.1e} relative", 0 < worst <= 1e-4)
    if not torch.cuda.is_available():
        yield Line("P15", "CPU against CUDA", "owed: no GPU", None)
        return
    depth, guide = _scene(generator, *trials[0][:2])
    cpu, cuda = (Upsampler(model, device=device, tile="none")(depth, guide, fill=True) for device in ("cpu", "cuda"))
    off = float(np.max(np.abs(cuda - cpu) / np.abs(cpu)))
    yield Line("P15", "CPU against CUDA", f"{off:.1e} relative", off <= 1e-5)


def _tiny(folder):
    from networks import tiny_pyramid

    from ddfup import models

    folder.mkdir(exist_ok=True)
    path = folder / "tiny.safetensors"
    models.save_weights(path, tiny_pyramid(), architecture="pyramid", name="tiny", description="tried")
    return str(path)


def _scene(generator, low, ratio):
    y, x = np.mgrid[: low[0], : low[1]] / low[0]
    depth = np.where(x + 0.3 * np.sin(4 * y) > 0.7, 1.2 + 0.2 * y, 3 + x).astype(np.float32)
    depth[generator.random(low) < 0.05] = 0
    return depth, generator.integers(0, 255, (low[0] * ratio, low[1] * ratio, 3), dtype=np.uint8)
