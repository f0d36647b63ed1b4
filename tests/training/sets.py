"""A tiny data set on disk and a configuration for it, shared by the tests of training and of its command."""

import numpy as np
from PIL import Image

CONFIG = """
[model]
architecture = "pyramid"
name = "tiny"
description = "of the tests"
[model.config]
feature_channels = [4, 6, 8, 8]
guide_channels = [6, 8, 8]
trunk_channels = 8
trunk_blocks = 2
context_channels = 4
[data]
tune_frames = 2
ratios = { 2 = 0.5, 4 = 0.3, any = 0.2 }
crops = { 4 = 16, 32 = 32 }
degradations = { bicubic = 0.5, nearest = 0.3, sensor = 0.2 }
pixels = 2048
disparity = 0.25
shrink = 1.5
augment_guide = true
[[data.train]]
path = "room"
last = 3
[[data.tune]]
path = "room"
first = 4
border = 2
[optimization]
steps = 6
warmup = 2
learning_rate = 2e-3
tune_every = 4
"""


def write_data(root, frames=6, size=(68, 84)):
    """Write ``room/rgb`` and ``room/depth`` (millimetres, some holes)."""
    for folder in ("rgb", "depth"):
        (root / "room" / folder).mkdir(parents=True)
    y, x = np.mgrid[0 : size[0], 0 : size[1]] / size[0]
    for i in range(frames):
        rng = np.random.default_rng(i)
        near = np.sin(5 * x + i) * np.cos(4 * y - i) > 0.2
        depth = np.where(near, 1500 + 200 * y, 3000 + 400 * x).astype(np.uint16)
        depth[rng.uniform(size=size) < 0.02] = 0
        colour = np.where(near[..., None], [200, 90, 60], [60, 120, 160]) + rng.integers(-9, 9, (*size, 3))
        Image.fromarray(depth).save(root / "room" / "depth" / f"{i:04d}.png")
        Image.fromarray(colour.astype(np.uint8)).save(root / "room" / "rgb" / f"{i:04d}.png")
    return root
