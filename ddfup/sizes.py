"""The one rule about the sizes of a depth map and its guide; knows neither files nor arrays."""

from __future__ import annotations

import math

from ddfup.errors import InputError

_TOLERANCE = 0.01


def check_sizes(
    depth_size: tuple[int, int], guide_size: tuple[int, int], *, depth: str = "depth", guide: str = "guide"
) -> None:
    """Refuse a depth and a guide that cannot show the same view.

    The aspect ratios may differ by 1 %, or by what rounding a small depth's sides to whole pixels explains.

    Args:
        depth_size: (width, height) of the depth, pixels.
        guide_size: (width, height) of the guide, upright.
        depth: What to call the depth in messages.
        guide: What to call the guide in messages.

    Raises:
        InputError: If the depth is larger than the guide or the aspect ratios do not agree.

    Example:
        >>> check_sizes((256, 192), (1920, 1440))
    """
    (w, h), (gw, gh) = depth_size, guide_size
    sizes = f"{depth} is {w}x{h}, {guide} is {gw}x{gh}"
    if w > gw or h > gh:
        raise InputError(f"depth must not be larger than its guide: {sizes}", "are the two swapped?")
    off = gw * h / (gh * w) - 1
    rounding = 0.5 / w + 0.5 / h
    if abs(off) > _TOLERANCE and abs(math.log1p(off)) > rounding:
        turned = abs(gw * w / (gh * h) - 1) <= _TOLERANCE
        raise InputError(
            f"depth and guide must show the same view (aspect within 1 %): {sizes}, {abs(off):.1%} off",
            "one of them is turned by 90 degrees: turn it, or correct its EXIF orientation"
            if turned
            else "crop one of them to the other's view",
        )
