"""Cutting a large image into overlapping tiles and putting their results together without seams."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

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


def _spans(length: int, core: int, halo: int, multiple: int) -> Iterator[tuple[int, int, int, int]]:
    # As few tiles as possible, and these alike: the CPU's convolutions are compiled anew for every size.
    count = -(-length // core)
    core = -(-length // (count * multiple)) * multiple
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
        for top, bottom, own_top, own_bottom in _spans(height, core, halo, multiple)
        for left, right, own_left, own_right in _spans(width, core, halo, multiple)
    ]


class Mosaic:
    """An image put together from the own parts of tiles.

    Args:
        height: In pixels.
        width: In pixels.
        cell: Side in pixels of what one value stands for.
        multiple: Of ``cell``, which the tiles' offsets keep; at the lower and right border whole ones are held.
        memory_format: Of the image.
    """

    def __init__(
        self,
        height: int,
        width: int,
        *,
        cell: int = 1,
        multiple: int = 1,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self._size = height, width
        self._cell, self._multiple = cell, multiple
        self._memory_format = memory_format
        self._image: Tensor | None = None

    def put(self, tile: Tile, part: Tensor) -> None:
        """Copy what a tile owns.

        Args:
            tile: Of this image.
            part: (N, C, H', W'), one value per cell of what the tile reads.
        """
        if self._image is None:
            shape = (*part.shape[:2], *(self._cells(side) for side in self._size))
            self._image = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=self._memory_format)
        top, _, left, _ = (self._cells(edge) for edge in tile.read)
        t, b, lf, r = (self._cells(edge) for edge in tile.own)
        self._image[..., t:b, lf:r] = part[..., t - top : b - top, lf - left : r - left]

    @property
    def image(self) -> Tensor:
        """The image, (N, C, H, W) in cells; what no tile has given is undefined.

        Raises:
            ArgumentError: If there was no tile.
        """
        if self._image is None:
            raise ArgumentError("tiles must cover the image; got none")
        return self._image

    def _cells(self, edge: int) -> int:
        return -(-edge // self._multiple) * (self._multiple // self._cell)
