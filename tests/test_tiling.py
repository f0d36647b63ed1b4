"""Tiles cover the image once, keep to the grid and read their halo; put together they are the image."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddfup.errors import ArgumentError
from ddfup.tiling import Mosaic, tiles


@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    multiple=st.sampled_from([1, 2, 4, 16]),
    halos=st.integers(0, 3),
    cores=st.integers(1, 4),
    rest=st.integers(0, 15),
)
def test_own_parts_cover_the_image_exactly_once(height, width, multiple, halos, cores, rest):
    halo = halos * multiple
    size = 2 * halo + cores * multiple + min(rest, multiple - 1)
    count = np.zeros((height, width), int)
    for tile in tiles(height, width, size=size, halo=halo, multiple=multiple):
        top, bottom, left, right = tile.own
        count[top:bottom, left:right] += 1
        for begin, end, own_begin, own_end, length in (
            (*tile.read[:2], *tile.own[:2], height),
            (*tile.read[2:], *tile.own[2:], width),
        ):
            assert begin % multiple == 0
            assert 0 <= begin <= own_begin < own_end <= end <= length
            assert end - begin <= max(size, length if length <= size else 0)
            # The halo is whole, or the image ends there.
            assert own_begin - begin == halo or begin == 0
            assert end - own_end == halo or end == length
    assert (count == 1).all()


def test_a_small_image_is_one_tile():
    (tile,) = tiles(30, 40, size=40, halo=16, multiple=8)
    assert tile.read == tile.own == (0, 30, 0, 40)


def test_tiles_come_row_by_row():
    corners = [tile.own[::2] for tile in tiles(20, 24, size=12, halo=0, multiple=4)]
    assert corners == [(0, 0), (0, 12), (12, 0), (12, 12)]


def test_tiles_are_as_few_as_possible_and_alike():
    # Cores of 88, the largest that fit, would make rows of 88 and 12, and columns of 88, 88 and 24.
    grid = tiles(100, 200, size=104, halo=8, multiple=4)
    assert {(tile.own[1] - tile.own[0], tile.own[3] - tile.own[2]) for tile in grid} == {
        (52, 68),
        (52, 64),
        (48, 68),
        (48, 64),
    }
    assert len(grid) == 2 * 3


def test_a_tile_that_is_all_halo_is_refused():
    with pytest.raises(ArgumentError, match="tile must be larger than twice the overlap of 16 pixels; got 39") as error:
        tiles(100, 100, size=39, halo=16, multiple=8)
    assert "--tile 96" in error.value.hint
    assert tiles(100, 100, size=40, halo=16, multiple=8)


@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    cell=st.sampled_from([1, 2, 4]),
    steps=st.sampled_from([1, 2]),
    halos=st.integers(0, 2),
    cores=st.integers(1, 4),
    last=st.booleans(),
)
def test_own_parts_put_together_are_the_image(height, width, cell, steps, halos, cores, last):
    multiple = cell * steps
    rows, columns = (-(-side // multiple) * steps for side in (height, width))
    image = torch.arange(2.0 * rows * columns).view(1, 2, rows, columns)
    memory_format = torch.channels_last if last else torch.contiguous_format
    mosaic = Mosaic(height, width, cell=cell, multiple=multiple, memory_format=memory_format)
    for tile in tiles(height, width, size=(2 * halos + cores) * multiple, halo=halos * multiple, multiple=multiple):
        top, bottom, left, right = (-(-edge // multiple) * steps for edge in tile.read)
        # What a tile has beyond its own part must not be taken.
        part = image[..., top:bottom, left:right] + 0.5
        t, b, lf, r = (-(-edge // multiple) * steps for edge in tile.own)
        part[..., t - top : b - top, lf - left : r - left] -= 0.5
        mosaic.put(tile, part)
    assert torch.equal(mosaic.image, image)
    assert mosaic.image.is_contiguous(memory_format=memory_format)


def test_an_image_of_no_tiles_is_refused():
    with pytest.raises(ArgumentError, match="tiles must cover the image; got none"):
        _ = Mosaic(4, 5).image
