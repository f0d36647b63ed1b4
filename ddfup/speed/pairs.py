"""Made-up pairs of any size for timing: what is on them costs nothing and changes nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ddfup.errors import ArgumentError


def depth_size(size: tuple[int, int], ratio: float) -> tuple[int, int]:
    """Return (width, height) of the depth that belongs to a guide.

    Args:
        size: (width, height) of the guide.
        ratio: Guide over depth.

    Raises:
        ArgumentError: If the ratio is below 1 or leaves no depth.

    Example:
        >>> depth_size((640, 480), 8)
        (80, 60)
    """
    if not ratio >= 1:
        raise ArgumentError(f"the ratio must be at least 1; got {ratio:g}")
    width, height = (round(side / ratio) for side in size)
    if width < 1 or height < 1:
        raise ArgumentError(
            f"the guide must be larger than the ratio, {ratio:g}; got {size[0]}x{size[1]}", "choose a smaller ratio"
        )
    return width, height


def make_pair(size: tuple[int, int], ratio: float) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Make depth in metres, (h, w), and a guide, (H, W, 3): slanted planes with edges between them.

    Raises:
        ArgumentError: If the ratio does not fit the size.
    """
    width, height = depth_size(size, ratio)
    y, x = np.ogrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    depth = (1 + x + 0.3 * y + ((5 * x + 3 * y) % 2 > 1)).astype(np.float32)
    rows, columns = np.arange(size[1], dtype=np.uint16), np.arange(size[0], dtype=np.uint16)
    # Bytes wrap around: stripes, edges and slopes without a large float array.
    plane = (rows[:, None] // 3 + columns // 2).astype(np.uint8)
    return depth, np.stack((plane, 255 - plane, plane // 2), axis=-1)
