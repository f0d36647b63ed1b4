"""Cutting a large image into overlapping tiles and putting the results together without seams."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ddfup.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile: the part of the image it reads, and the part of the result it owns.

    Attributes:
        read: (top, bottom, left, right) in pixels.
        own: Likewise, inside ``read``; the own parts of all tiles cover the image once.
    """

    read: tuple[int, int, int, int]
    own: tuple[int, int, int, int]


def _spans(length: int, core: int, halo: int) -> Iterator[tuple[int, int, int, int]]:
    for begin in range(0, length, core):
        end = min(length, begin + core)
        yield max(0, begin - halo), min(length, end + halo), begin, end


def tiles(height: int, width: int, *, size: int, halo: int, multiple: int) -> list[Tile]:
    """Cut an image into tiles.

    Args:
        height: Of the image, pixels.
        width: Of the image, pixels.
        size: Side of a tile with its halo, pixels; images no larger are one tile.
        halo: What a tile reads beyond its own part, a multiple of ``multiple``.
        multiple: Every tile begins at a multiple of this.

    Returns:
        The tiles, row by row.

    Raises:
        ArgumentError: If nothing is left of a tile without its halo.
    """
    if height <= size and width <= size:
        whole = (0, height, 0, width)
        return [Tile(whole, whole)]
    core = (size - 2 * halo) // multiple * multiple
    if core < multiple:
        raise ArgumentError(
            f"tile must be larger than twice the overlap of {halo} pixels; got {size}",
            f"use at least --tile {2 * halo + 8 * multiple}",
        )
    return [
        Tile((top, bottom, left, right), (own_top, own_bottom, own_left, own_right))
        for top, bottom, own_top, own_bottom in _spans(height, core, halo)
        for left, right, own_left, own_right in _spans(width, core, halo)
    ]
