"""The default network's promises: any ratio, affine equivariance, holes, tiles."""

import math

import pytest
import torch
from networks import TINY_PYRAMID, pair, tiny_pyramid

from ddfup.errors import ArgumentError
from ddfup.models import consistency, stages
from ddfup.models.context import ContextEncoder
from ddfup.models.parts import Window
from ddfup.models.pyramid import GuidedPyramid
from ddfup.models.sampling import fill_holes, positions, sample_rows_columns
from ddfup.tiling import tiles

# Low and high sizes (h, w); ratios 1, 1.3, 2, 3, 4, 7.5, 8, 16, 32, odd guides, single pixels.
SIZES = [
    ((12, 15), (12, 15)),
    ((10, 20), (13, 26)),
    ((9, 11), (18, 22)),
    ((8, 10), (24, 30)),
    ((8, 8), (32, 32)),
    ((6, 8), (45, 60)),
    ((6, 7), (48, 56)),
    ((3, 4), (48, 64)),
    ((2, 3), (64, 96)),
    ((8, 6), (63, 47)),
    ((1, 1), (17, 23)),
    ((1, 5), (3, 16)),
    ((1, 1), (1, 1)),
]
IDS = [f"{low}-{high}" for low, high in SIZES]


NETWORKS = pytest.mark.parametrize("changes", [{}, {"packed_head": True}], ids=["features", "packed"])


def cubic(depth, size):
    """The plain interpolation, from the resampling that has its own tests."""
    at = (positions(0, size[i], 1, size[i] / depth.shape[i - 2], depth.device) for i in (0, 1))
    return sample_rows_columns(depth, *at)


def span(depth):
    return float(depth.max() - depth.min()) or 1.0


@pytest.mark.parametrize(("low", "high"), SIZES, ids=IDS)
@pytest.mark.parametrize("holes", [0.0, 0.3])
@NETWORKS
@torch.no_grad()
def test_any_size_gives_a_finite_map_of_the_guides_size(low, high, holes, changes):
    depth, guide = pair(low, high, n=2)
    valid = torch.rand(depth.shape, generator=torch.Generator().manual_seed(1)) >= holes
    valid[:, :, 0, 0] = True
    out = tiny_pyramid(**changes)(depth, guide, valid)
    assert out.shape == (2, 1, *high)
    assert out.isfinite().all()


@pytest.mark.parametrize(("low", "high"), SIZES, ids=IDS)
@pytest.mark.parametrize(("scale", "offset"), [(4.0, 0.0), (0.001, 0.0), (2.0, 2.0**20), (1.0, -5000.0)])
@NETWORKS
@torch.no_grad()
def test_scaling_and_shifting_the_depth_does_so_to_the_result(low, high, scale, offset, changes):
    network = tiny_pyramid(**changes)
    depth, guide = pair(low, high)
    valid = torch.rand(depth.shape, generator=torch.Generator().manual_seed(1)) > 0.2
    valid[:, :, 0, 0] = True
    base = network(depth, guide, valid)
    # Depth in whole units: the shifted map is exact in float32, so that only the network can go wrong.
    moved = network(scale * depth + offset, guide, valid)
    tolerance = 2e-5 * scale * span(depth) + 2.0**-22 * abs(offset)
    torch.testing.assert_close(moved, scale * base + offset, atol=tolerance, rtol=0)


@pytest.mark.parametrize("value", [0.1, 65.535, 1e5, 1e-6])
@pytest.mark.parametrize(("low", "high"), SIZES[::3])
@NETWORKS
@torch.no_grad()
def test_a_constant_map_stays_constant_exactly(low, high, value, changes):
    _, guide = pair(low, high)
    depth = torch.full((1, 1, *low), value)
    assert (tiny_pyramid(**changes)(depth, guide) == depth[0, 0, 0, 0]).all()


@pytest.mark.parametrize(("low", "high"), SIZES[:9], ids=IDS[:9])
@torch.no_grad()
def test_invalid_values_never_matter(low, high):
    network = tiny_pyramid()
    depth, guide = pair(low, high)
    valid = torch.rand(depth.shape, generator=torch.Generator().manual_seed(3)) > 0.4
    valid[:, :, -1, -1] = True
    valid[:, :, 0, 0] = False
    outputs = []
    for garbage in (0.0, math.nan, math.inf, -math.inf, 1e30, -1e30):
        outputs.append(network(torch.where(valid, depth, garbage), guide, valid))
    assert outputs[0].isfinite().all()
    for other in outputs[1:]:
        assert torch.equal(other, outputs[0])
    # Without a mask, whatever is not finite is invalid.
    assert torch.equal(network(torch.where(valid, depth, math.nan), guide), outputs[0])


@pytest.mark.parametrize(("low", "high"), SIZES[:9], ids=IDS[:9])
@NETWORKS
@torch.no_grad()
def test_samples_of_a_batch_do_not_see_each_other(low, high, changes):
    network = tiny_pyramid(**changes)
    depth, guide = pair(low, high, n=3)
    depth[1] *= 50
    valid = torch.ones_like(depth, dtype=torch.bool)
    valid[2, :, 0, 0] = depth[2].numel() == 1
    together = network(depth, guide, valid)
    for i in range(3):
        alone = network(depth[i : i + 1], guide[i : i + 1], valid[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4 * span(depth[i]), rtol=0)


@pytest.mark.parametrize(
    ("low", "high"), [((6, 8), (48, 64)), ((6, 8), (45, 60)), ((4, 5), (34, 40)), ((1, 1), (24, 24))]
)
def test_the_phase_says_where_a_cell_lies_in_its_low_resolution_pixel(low, high):
    network = tiny_pyramid()
    depth, _ = pair(low, high)
    zero = torch.zeros(1, 1, 1, 1)
    prepared = network._describe(depth, depth > 0, high, zero, zero + 1)
    step = 8
    rows, columns = math.ceil(high[0] / step), math.ceil(high[1] / step)
    phase = prepared.phase(Window(0, 0, rows * step, columns * step), step)
    assert phase.shape == (1, 4, rows, columns)
    for i in range(rows):
        for j in range(columns):
            # Turns from one pixel's middle to the next.
            y, x = (i + 0.5) * step * low[0] / high[0] - 0.5, (j + 0.5) * step * low[1] / high[1] - 0.5
            angles = 2 * math.pi * y, 2 * math.pi * x
            expected = [math.cos(angles[0]), math.sin(angles[0]), math.cos(angles[1]), math.sin(angles[1])]
            torch.testing.assert_close(phase[0, :, i, j], torch.tensor(expected), atol=1e-5, rtol=0)
    # A part of the image sees the phase of the whole.
    part = prepared.phase(Window(8, 8, 16, 8), step)
    torch.testing.assert_close(part, phase[..., 1:3, 1:2], atol=1e-5, rtol=0)


# A picture wide enough for several tiles with their halos, and low enough to be quick.
@pytest.mark.parametrize(
    ("low", "high"),
    [
        ((33, 260), (33, 260)),
        ((24, 160), (48, 320)),
        ((15, 120), (45, 360)),
        ((5, 40), (65, 521)),
        ((9, 80), (67, 600)),
        ((10, 80), (80, 640)),
        ((3, 60), (48, 960)),
    ],
)
@NETWORKS
@torch.no_grad()
def test_tiles_equal_the_whole(low, high, changes, monkeypatch):
    network = tiny_pyramid(**changes)
    depth, guide = pair(low, high)
    valid = torch.rand(depth.shape, generator=torch.Generator().manual_seed(1)) > 0.1
    whole = network(depth, guide, valid)
    # The network must have something to get wrong.
    far = (whole - cubic(fill_holes(torch.where(valid, depth, 0), valid), high)).abs().mean()
    assert far > 0.005 * span(depth)

    std, mean = torch.std_mean(guide, dim=(1, 2, 3), keepdim=True, correction=0)
    multiple, halo = network.tile_grid(math.sqrt(high[0] / low[0] * high[1] / low[1]))
    assert halo % multiple == 0

    def tiled(halo):
        out = torch.full_like(whole, math.nan).repeat(1, 2, 1, 1)
        grid = tiles(*high, size=2 * halo + 3 * multiple, halo=halo, multiple=multiple)
        parts = [(t, guide[..., t.read[0] : t.read[1], t.read[2] : t.read[3]]) for t in grid]
        prepared = network.prepare(depth, valid, size=high, guide_mean=mean, guide_std=std, parts=iter(parts))
        for tile, part in parts:
            top, _, left, _ = tile.read
            part = network.region(prepared, part, top, left)
            t, b, lf, r = tile.own
            out[..., t:b, lf:r] = part[..., t - top : b - top, lf - left : r - left]
        return network.finish(prepared, out)

    # Several strips, too.
    monkeypatch.setattr(consistency, "_STRIP", 1)
    monkeypatch.setattr(stages, "_STRIP_PIXELS", 20)
    assert len(tiles(*high, size=2 * halo + 3 * multiple, halo=halo, multiple=multiple)) > 1
    torch.testing.assert_close(tiled(halo), whole, atol=1e-4 * span(depth), rtol=0)
    # And without the halo it would: the comparison can fail.
    assert (tiled(0) - whole).abs().max() > 1e-3 * span(depth)


@torch.no_grad()
def test_tiles_must_be_given_where_the_guide_is_encoded_beforehand():
    network = tiny_pyramid()
    depth, guide = pair((6, 8), (48, 64))
    std, mean = torch.std_mean(guide, dim=(1, 2, 3), keepdim=True, correction=0)
    with pytest.raises(ArgumentError, match="tiles must cover the image; got none"):
        network.prepare(depth, depth > 0, size=(48, 64), guide_mean=mean, guide_std=std, parts=[])


def test_gradients_reach_every_parameter_over_the_ratios():
    network = tiny_pyramid().train()
    for low, high in SIZES[:9]:
        depth, guide = pair(low, high, n=2)
        out = network(depth, guide)
        (out / span(depth)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("low", "high"), SIZES[:9], ids=IDS[:9])
@torch.no_grad()
def test_an_untrained_network_is_nearly_the_cubic_interpolation(low, high):
    torch.manual_seed(0)
    network = GuidedPyramid(TINY_PYRAMID).eval()
    depth, guide = pair(low, high)
    reference = cubic(depth, high)
    assert (network(depth, guide) - reference).square().mean().sqrt() < 0.2 * depth.std()


@torch.no_grad()
def test_the_guide_steers_the_result():
    network = tiny_pyramid()
    depth, guide = pair((6, 8), (48, 64))
    assert (network(depth, guide) - network(depth, guide.flip(-1))).abs().max() > 1e-3 * span(depth)


def test_a_large_map_does_not_overflow_half_precision():
    """float16 ends at 65,504, which a sum over this many pixels passes."""
    torch.manual_seed(0)
    encoder = ContextEncoder(6)
    torch.nn.init.constant_(encoder.mix.bias, 4.0)
    depth = torch.randn(2, 1, 310, 450)
    valid = torch.rand(2, 1, 310, 450) > 0.1
    with torch.no_grad():
        expected = encoder(depth, valid, 8)
        with torch.autocast("cpu", torch.float16):
            found = encoder(depth, valid, 8)
    assert 0.5 * 310 * 450 * expected.abs().max() > 65504
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.005)
