"""What replaces parts of the networks while they are traced computes what those do."""

import sys
from pathlib import Path

import pytest
import torch

from ddfup.errors import ArgumentError, ExportError
from ddfup.export import checks, decompose, shapes
from ddfup.models.context import ContextEncoder
from ddfup.models.sampling import fill_holes

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
import ddf_cases
from networks import tiny_ddfupnet, tiny_pyramid

SIZES = [(2, 2), (3, 5), (12, 36), (30, 41), (59, 60), (61, 83), (7, 300), (35, 84)]


def make(size, holes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    depth = torch.randn((1, 1, *size), generator=generator)
    valid = torch.rand(depth.shape, generator=generator) >= holes
    if holes:
        valid[..., : size[0] // 2, size[1] // 3 :] = False
        valid[..., -1, 0] = True
    return depth, valid


@pytest.mark.parametrize("case", ddf_cases.CASES, ids=str)
def test_the_op_in_standard_operators_is_the_sum_of_its_formula(case):
    torch.manual_seed(0)
    inputs = ddf_cases.make_inputs(case)
    ddf_cases.assert_close(decompose.ddf(*inputs, *case.options), ddf_cases.loops(case, *inputs))


@pytest.mark.parametrize("holes", [0, 0.02, 0.5, 0.98])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_holes_are_filled_as_in_the_networks(size, holes):
    depth, valid = make(size, holes)
    torch.testing.assert_close(shapes.fill_holes(depth, valid), fill_holes(depth, valid), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [*SIZES, (700, 26)], ids=str)
def test_a_map_is_described_as_in_the_networks(size):
    torch.manual_seed(1)
    encoder = ContextEncoder(5)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    depth, valid = make(size, 0.1)
    with torch.no_grad():
        expected = encoder(depth, valid, 7.3)
        found = shapes.describe(encoder, depth, valid, 7.3)
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- what is tried ---


@pytest.mark.parametrize("ratio", [1, 1.5, 2, 3, 7.5, 8, 13.5, 16, 31, 32])
def test_a_plan_covers_its_range(ratio):
    network = tiny_pyramid()
    plan = checks.plan(network, ratio)
    low, high = plan.ratios
    assert 1 <= low <= ratio < high
    level = network.level(ratio)
    assert plan.multiple == 2**level
    assert network.level(low) == network.level(high - 1e-6) == level
    assert low == 1 or network.level(low - 1e-6) == level - 1
    assert high > 32 or network.level(high + 1e-6) == level + 1
    cases = (plan.example, *plan.cases)
    for case in cases:
        assert low <= case.ratio < high and all(side % plan.multiple == 0 for side in case.guide)
        assert min(case.depth) >= 2 and case.guide[0] >= case.depth[0] and case.guide[1] >= case.depth[1]
    # Both ends of the range are tried, with and without holes, and none is the example.
    spread = [case.ratio for case in cases]
    # From 30 on the range is short and ends at 32; small guides of whole cells meet no other ratio in it.
    if ratio < 30:
        assert min(spread) < low + 0.15 * (high - low) and max(spread) > high - 0.15 * (high - low)
    assert {case.holes for case in plan.cases} == {True, False}
    assert plan.example.guide not in [case.guide for case in plan.cases]
    sides = [*plan.example.depth, *plan.example.guide]
    assert len(set(sides)) == 4


def test_a_network_of_one_scale_serves_every_ratio():
    plan = checks.plan(tiny_ddfupnet(4), 8)
    assert plan.ratios[0] == 1 and plan.ratios[1] > 32 and plan.multiple == 4


def test_fixed_sizes_are_tried_as_they_are():
    plan = checks.plan(tiny_pyramid(), 8, guide=(75, 101), depth=(10, 13))
    assert plan.multiple is None and plan.ratio == pytest.approx((7.5 * 101 / 13) ** 0.5)
    assert {(case.depth, case.guide, case.holes) for case in plan.cases} == {
        ((10, 13), (75, 101), True),
        ((10, 13), (75, 101), False),
    }
    assert checks.plan(tiny_pyramid(), 4, guide=(480, 640)).example.depth == (120, 160)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 33}, "--ratio must be 1 to 32; got 33"),
        ({"ratio": 8, "guide": (40, 50), "depth": (41, 50)}, "no more than the guide; got 50x41 for 50x40"),
        ({"ratio": 8, "guide": (400, 500), "depth": (4, 5)}, "must be 1 to 32; got 100"),
    ],
    ids=str,
)
def test_plans_that_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        checks.plan(tiny_pyramid(), **arguments)


def test_what_is_missing_may_hold_anything():
    depth, guide, valid = checks.Case((20, 30), (40, 60)).inputs()
    assert depth[~valid].isnan().all() and depth[valid].isfinite().all() and 0.5 < valid.double().mean() < 0.95
    assert 0 <= guide.min() and guide.max() <= 1
    assert checks.Case((20, 30), (40, 60), holes=False).inputs()[2].all()


class Doubling(torch.nn.Module):
    def forward(self, depth, guide, valid):
        return torch.where(valid, depth, 0) * 2


CASE = checks.Case((6, 8), (6, 8))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda out: out + 2e-5 * 4, "off by"),
        (lambda out: out * torch.nan, "off by"),
        (lambda out: out[..., 1:], "off by inf"),
        (lambda out: 1 / 0, "must run on a guide of 8x6 with depth of 8x6; got division by zero"),
    ],
    ids=["far", "nan", "shape", "raises"],
)
def test_what_differs_is_refused(wrong, message):
    network = Doubling()
    assert checks.compare(network, lambda inputs: network(*inputs), [CASE]) == 0
    assert 0 < checks.compare(network, lambda inputs: network(*inputs) + 1e-6, [CASE]) < checks.TOLERANCE
    with pytest.raises(ExportError, match=message):
        checks.compare(network, lambda inputs: wrong(network(*inputs)), [CASE])
