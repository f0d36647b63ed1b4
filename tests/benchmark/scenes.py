"""Small scenes with sharp edges that depth and guide share, in memory and as a data set on disk."""

import numpy as np
from PIL import Image


def scene(height=48, width=64, seed=0):
    """True depth (H, W) float32 of 1 to 4 metres and a guide (H, W, 3) uint8 with the same edges."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    near = (x - 0.45 * width) ** 2 + (y - 0.5 * height) ** 2 < (0.3 * height) ** 2
    near |= (x + 0.7 * y + 5 * seed) % 37 < 9
    depth = np.where(near, 1.2 + 0.004 * y, 3 + 0.01 * x).astype(np.float32)
    colour = np.where(near[..., None], [200, 90, 60], [60, 120, 160]) + rng.integers(-6, 7, (height, width, 3))
    return depth, colour.astype(np.uint8)


def write_dataset(folder, count=3, size=(48, 64), disparity=False):
    """Write rgb/ and depth/: uint16 millimetres, or 8-bit levels with some zeros."""
    for name in ("rgb", "depth"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        depth, guide = scene(*size, seed=i)
        stored = (1000 * depth).round().astype(np.uint16)
        if disparity:
            stored = (240 / depth).astype(np.uint8)
            stored[5 + i, 7:9] = 0
        Image.fromarray(stored).save(folder / "depth" / f"{i:02d}.png")
        Image.fromarray(guide).save(folder / "rgb" / f"{i:02d}.png")
    return folder
