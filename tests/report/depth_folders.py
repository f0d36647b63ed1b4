"""Folders of predictions, ground truth, inputs and guides for the tests of reports: small, but with edges and holes."""

import cv2
import numpy as np
from PIL import Image

SIZE = (60, 80)


def truth(seed):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    depth = 2 + 0.01 * y + 0.005 * x
    top, left = rng.integers(5, 25), rng.integers(5, 40)
    depth[top : top + 25, left : left + 30] = 1.1 + 0.1 * rng.random()
    return depth.astype(np.float32)


def prediction(depth, seed, noise):
    return (depth + np.random.default_rng(100 + seed).normal(0, noise, depth.shape)).astype(np.float32)


def write_png(path, depth):
    """Store metres as 16-bit millimetres; NaN as 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.nan_to_num(depth * 1000).round().astype(np.uint16)).save(path)


def write_folders(root, names, *, noise=0.01):
    """Write pred/, gt/, low/ and guides/; the noise of the predictions grows with the index."""
    for index, name in enumerate(names):
        depth = truth(index)
        guess = prediction(depth, index, noise * (index + 1))
        guess[:3, :3] = np.nan
        write_png(root / "pred" / f"{name}.png", guess)
        holed = depth.copy()
        holed[-4:] = np.nan
        write_png(root / "gt" / f"{name}.png", holed)
        write_png(root / "low" / f"{name}.png", depth[3::8, 3::8])
        guide = cv2.applyColorMap((depth * 90).astype(np.uint8), cv2.COLORMAP_BONE)
        (root / "guides" / f"{name}.x").parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(guide).save(root / "guides" / f"{name}.jpg")
    return root
