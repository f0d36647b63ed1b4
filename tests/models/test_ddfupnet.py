"""The paper's network: its sizes, its factors, and ratios it was not made for."""

import pytest
import torch
from networks import pair, tiny_ddfupnet

from ddfup.errors import ArgumentError
from ddfup.models.ddfupnet import DDFUpNet, DDFUpNetConfig
from ddfup.models.sampling import positions, sample_rows_columns


@pytest.mark.parametrize("scale", [2, 4, 8, 16])
@torch.no_grad()
def test_the_result_has_the_guides_size(scale):
    depth, guide = pair((3, 4), (3 * scale, 4 * scale), n=2)
    out = tiny_ddfupnet(scale)(depth, guide)
    assert out.shape == (2, 1, 3 * scale, 4 * scale)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("low", "high"),
    [((4, 5), (30, 37)), ((4, 5), (4, 5)), ((1, 1), (9, 9)), ((12, 16), (19, 25)), ((2, 3), (64, 96))],
)
@torch.no_grad()
def test_other_ratios_are_resampled_first(low, high):
    depth, guide = pair(low, high)
    out = tiny_ddfupnet(4)(depth, guide)
    assert out.shape == (1, 1, *high)
    assert out.isfinite().all()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("low", "high"), [((6, 8), (24, 32)), ((5, 6), (37, 45))])
@pytest.mark.parametrize(("scale", "offset"), [(4.0, 0.0), (0.001, 0.0), (2.0, 2.0**20)])
@torch.no_grad()
def test_scaling_and_shifting_the_depth_does_so_to_the_result(low, high, scale, offset, skip):
    network = tiny_ddfupnet(4, skip=skip)
    depth, guide = pair(low, high)
    valid = torch.rand(depth.shape, generator=torch.Generator().manual_seed(1)) > 0.2
    base = network(depth, guide, valid)
    moved = network(scale * depth + offset, guide, valid)
    span = float(depth.max() - depth.min())
    torch.testing.assert_close(moved, scale * base + offset, atol=2e-5 * scale * span + 2.0**-22 * abs(offset), rtol=0)
    # Not trivially so.
    assert base.std() > 0.01 * depth.std()


@torch.no_grad()
def test_invalid_values_never_matter():
    network = tiny_ddfupnet(2)
    depth, guide = pair((6, 8), (12, 16))
    valid = torch.ones_like(depth, dtype=torch.bool)
    valid[..., 2:4, 3:5] = False
    expected = network(torch.where(valid, depth, 0), guide, valid)
    assert torch.equal(network(torch.where(valid, depth, torch.nan), guide), expected)
    assert torch.equal(network(torch.where(valid, depth, 1e30), guide, valid), expected)


@torch.no_grad()
def test_the_skip_adds_the_interpolated_depth():
    depth, guide = pair((6, 8), (12, 16))
    plain, skip = tiny_ddfupnet(2), tiny_ddfupnet(2, skip=True)
    difference = skip(depth, guide) - plain(depth, guide)
    # What is added is the depth without its mean, at the result's resolution.
    rows, columns = (positions(0, size, 1, 2, depth.device) for size in (12, 16))
    expected = sample_rows_columns(depth - depth.mean(), rows, columns)
    torch.testing.assert_close(difference, expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize("scale", [2, 8])
def test_gradients_reach_every_parameter(scale):
    torch.manual_seed(0)
    network = DDFUpNet(DDFUpNetConfig(scale=scale))
    depth, guide = pair((4, 5), (4 * scale, 5 * scale), n=2)
    (network(depth, guide) / 100).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# Depth encoder 1-32-32-32, guide encoder 3-32-32-16 per stage, decoder 32-32-1, all 5 x 5; and the DDF-Ups.
@pytest.mark.parametrize("scale", [2, 4, 8, 16])
def test_the_size_is_that_of_the_papers_layout(scale):
    stages = {2: 1, 4: 2, 8: 3, 16: 4}[scale]
    network = DDFUpNet(DDFUpNetConfig(scale=scale))
    convolutions = [(1, 32), (32, 32), (32, 32), (3, 32), (32, 32), (32, 16 * stages), (32, 32), (32, 1)]
    expected = sum(25 * a * b + b for a, b in convolutions)
    filters = sum(p.numel() for p in network.stages.parameters())
    assert sum(p.numel() for p in network.parameters()) == expected + filters
    if scale == 8:
        assert expected + filters == 180_303


@pytest.mark.parametrize("scale", [0, 1, 3, 32])
def test_other_scales_are_refused(scale):
    with pytest.raises(ArgumentError, match=f"scale must be 2, 4, 8 or 16; got {scale}"):
        DDFUpNet(DDFUpNetConfig(scale=scale))
