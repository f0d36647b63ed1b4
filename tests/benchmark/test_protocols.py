"""The protocols' facts, and which of them options may change."""

import pytest

from ddfup.benchmark.protocols import PROTOCOLS, setup
from ddfup.degrade import DEGRADATIONS
from ddfup.errors import ArgumentError


@pytest.mark.parametrize(
    ("protocol", "disparity", "degradations", "factors", "border"),
    [
        ("point", False, ("nearest",), (4, 8, 16), 6),
        ("bicubic", False, ("bicubic",), (4, 8, 16), 6),
        ("bicubic", True, ("bicubic",), (4, 8, 16), 0),
        ("robust", False, ("nearest", "bicubic", "area", "sensor"), (2, 4, 7.5, 8, 16, 32), 6),
        ("robust", True, ("nearest", "bicubic", "area", "sensor"), (2, 4, 7.5, 8, 16, 32), 0),
        ("holes", False, ("holes",), (4, 8, 16), 6),
        ("custom", False, ("bicubic",), (4, 8, 16), 0),
    ],
)
def test_facts(protocol, disparity, degradations, factors, border):
    plan = setup(protocol, disparity=disparity)
    assert (plan.protocol, plan.degradations, plan.factors, plan.border) == (protocol, degradations, factors, border)
    assert (plan.unit, plan.scale) == (("levels", 1) if disparity else ("cm", 100))
    assert plan.thresholds.unit == ("" if disparity else "m")
    assert set(degradations) <= set(DEGRADATIONS)


def test_which_protocol_when_none_is_named():
    assert setup().protocol == "bicubic"
    assert setup(factors=[2]).protocol == "bicubic"
    assert setup(degradations=["area"]).protocol == setup(border=3).protocol == "custom"


def test_changes():
    plan = setup("custom", degradations=["area", "nearest", "area"], factors=[8, 2.5, 8], border=3)
    assert (plan.degradations, plan.factors, plan.border) == (("area", "nearest"), (8, 2.5), 3)
    assert setup("point", degradations=["nearest"], border=6, factors=[3]).factors == (3,)
    assert setup("robust", degradations=["sensor"]).degradations == ("sensor",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "kitti"}, "--protocol must be one of point, bicubic, robust, holes, custom; got 'kitti'"),
        ({"degradations": ["blur"]}, "--degradation must be one of .*; got 'blur'"),
        ({"protocol": "point", "degradations": ["area"]}, "protocol point must be nearest; got area"),
        ({"protocol": "bicubic", "border": 0}, "--crop-border of the protocol bicubic must be 6 here; got 0"),
        ({"factors": [0.5]}, "--factor must be at least 1; got 0.5"),
        ({"factors": [float("nan")]}, "--factor must be at least 1; got nan"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        setup(**arguments)


def test_every_protocol_says_what_it_is():
    for name, row in PROTOCOLS.items():
        assert row.name == name and row.description.endswith(".")
