"""The feature pyramid: torchvision's values and keys with "nearest", every upsampler by an independent path."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddfup.errors import ArgumentError
from ddfup.models.flops import count_macs
from ddfup.models.fpn import UPSAMPLERS, Carafe, FeaturePyramid, LastLevelMaxPool, PixelShuffle

LEARNED = ("deconvolution", "pixel_shuffle", "carafe", "ddf_up")


def levels(*sizes, channels=(4, 6, 8), batch=2):
    """Random levels of those sizes, finest first."""
    shapes = zip(channels, sizes, strict=True)
    return OrderedDict((f"c{i}", torch.randn(batch, c, *size)) for i, (c, size) in enumerate(shapes))


def nearest_pyramid(state, features):
    """The network as its paper draws it, from the weights alone; index arithmetic instead of interpolation."""

    def conv(x, name, padding):
        return F.conv2d(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"], padding=padding)

    maps = list(features.values())
    merged, results = None, []
    for i in reversed(range(len(maps))):
        lateral = conv(maps[i], f"inner_blocks.{i}", 0)
        if merged is not None:
            (h, w), (low_h, low_w) = lateral.shape[2:], merged.shape[2:]
            rows, columns = torch.arange(h) * low_h // h, torch.arange(w) * low_w // w
            lateral = lateral + merged[:, :, rows][:, :, :, columns]
        merged = lateral
        results.insert(0, conv(merged, f"layer_blocks.{i}", 1))
    return dict(zip(features, results, strict=True))


@pytest.mark.parametrize("sizes", [((16, 24), (8, 12), (4, 6)), ((13, 21), (7, 11), (4, 6)), ((9, 9), (9, 9), (2, 5))])
def test_nearest_is_the_network_of_the_paper(sizes):
    torch.manual_seed(0)
    neck, features = FeaturePyramid([4, 6, 8], 5, upsampler="nearest"), levels(*sizes)
    for parameter in neck.parameters():
        nn.init.normal_(parameter)
    got = neck(features)
    assert isinstance(got, OrderedDict) and list(got) == ["c0", "c1", "c2"]
    expected = nearest_pyramid(neck.state_dict(), features)
    for name, level in got.items():
        torch.testing.assert_close(level, expected[name])


@pytest.mark.parametrize("upsampler", UPSAMPLERS)
def test_keys_are_those_of_torchvision_and_the_upsamplers(upsampler):
    own = {key for key in FeaturePyramid([4, 6], 5, upsampler=upsampler).state_dict() if "upsamplers" not in key}
    kinds = ("inner_blocks", "layer_blocks")
    assert own == {f"{kind}.{i}.0.{part}" for kind in kinds for i in range(2) for part in ("weight", "bias")}


def test_torchvision_computes_the_same():
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed", exc_type=ImportError)
    theirs = ops.FeaturePyramidNetwork([4, 6, 8], 5, ops.feature_pyramid_network.LastLevelMaxPool())
    neck = FeaturePyramid([4, 6, 8], 5, LastLevelMaxPool(), upsampler="nearest")
    neck.load_state_dict(theirs.state_dict())
    features = levels((13, 21), (7, 11), (4, 6))
    expected, got = theirs(features), neck(features)
    assert list(got) == list(expected)
    for name, level in got.items():
        torch.testing.assert_close(level, expected[name])


@pytest.mark.parametrize("upsampler", UPSAMPLERS)
@pytest.mark.parametrize(
    "sizes", [((16, 24), (8, 12), (4, 6)), ((13, 21), (7, 11), (4, 6)), ((13, 19), (6, 9), (3, 4))]
)
def test_every_upsampler_gives_every_level_its_size(upsampler, sizes):
    got = FeaturePyramid([4, 6, 8], 5, upsampler=upsampler)(levels(*sizes))
    assert [tuple(level.shape) for level in got.values()] == [(2, 5, *size) for size in sizes]


@pytest.mark.parametrize("upsampler", UPSAMPLERS)
def test_gradients_reach_every_parameter(upsampler):
    torch.manual_seed(0)
    neck = FeaturePyramid([4, 6, 8], 30, upsampler=upsampler)
    out = neck(levels((13, 21), (7, 11), (4, 6)))
    sum(level.square().mean() for level in out.values()).backward()
    for name, parameter in neck.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("upsampler", LEARNED)
def test_a_learned_upsampler_is_cut_or_its_border_repeated(upsampler):
    torch.manual_seed(0)
    layer, x = FeaturePyramid([4, 4], 5, upsampler=upsampler).upsamplers[0], torch.randn(1, 5, 4, 6)
    full = layer.layer(x)
    assert full.shape == (1, 5, 8, 12)
    assert torch.equal(layer(x, (8, 12)), full)
    assert torch.equal(layer(x, (7, 11)), full[..., :7, :11])
    wide = layer(x, (9, 13))
    assert torch.equal(wide[..., :8, :12], full)
    assert torch.equal(wide[..., 8, :12], full[..., 7, :]) and torch.equal(wide[..., 12], wide[..., 11])
    with pytest.raises(ArgumentError, match=r"twice the size of the next, \(8, 12\).*; got \(10, 12\)"):
        layer(x, (10, 12))


def test_bilinear_interpolates_between_pixel_centres():
    layer = FeaturePyramid([4, 4], 1, upsampler="bilinear").upsamplers[0]
    row = layer(torch.tensor([[[[0.0, 4.0]]]]), (1, 4))
    assert row.flatten().tolist() == [0.0, 1.0, 3.0, 4.0]


def test_pixel_shuffle_lays_groups_of_channels_out_as_pixels():
    torch.manual_seed(0)
    layer, x = PixelShuffle(3), torch.randn(1, 3, 4, 5)
    expanded, got = layer.expand(x), layer(x)
    for i in range(2):
        for j in range(2):
            assert torch.equal(got[:, :, i::2, j::2], expanded[:, 2 * i + j :: 4])


@pytest.mark.parametrize(("scale", "kernel_size"), [(2, 5), (3, 3)])
def test_carafe_is_a_weighted_mean_of_the_window_around_the_source_pixel(scale, kernel_size):
    torch.manual_seed(0)
    layer = Carafe(3, scale=scale, kernel_size=kernel_size, compressed=4).double()
    x, half = torch.randn(1, 3, 3, 4, dtype=torch.float64), kernel_size // 2
    raw = layer.encode(layer.compress(x))[0].view(scale**2, kernel_size**2, 3, 4)
    got = layer(x)
    assert got.shape == (1, 3, 3 * scale, 4 * scale)
    for row in range(3 * scale):
        for column in range(4 * scale):
            y, left = row // scale, column // scale
            logits = raw[(row % scale) * scale + column % scale, :, y, left]
            total = torch.zeros(3, dtype=torch.float64)
            for tap, weight in enumerate(torch.exp(logits) / torch.exp(logits).sum()):
                v, u = y + tap // kernel_size - half, left + tap % kernel_size - half
                if 0 <= v < 3 and 0 <= u < 4:
                    total += weight * x[0, :, v, u]
            torch.testing.assert_close(got[0, :, row, column], total)


def test_upsamplers_run_under_autocast():
    x = levels((8, 8), (4, 4), channels=(4, 6))
    for upsampler in UPSAMPLERS:
        with torch.autocast("cpu", torch.bfloat16):
            assert FeaturePyramid([4, 6], 5, upsampler=upsampler)(x)["c0"].dtype == torch.bfloat16


def test_extra_levels_and_normalisation():
    features = levels((8, 9), (4, 5), channels=(4, 6))
    neck = FeaturePyramid([4, 6], 5, LastLevelMaxPool(), nn.BatchNorm2d)
    got = neck(features)
    assert list(got) == ["c0", "c1", "pool"]
    assert torch.equal(got["pool"], got["c1"][:, :, ::2, ::2])
    for block in (*neck.inner_blocks, *neck.layer_blocks):
        assert block[0].bias is None and isinstance(block[1], nn.BatchNorm2d)


def test_extra_levels_see_outputs_inputs_and_names():
    seen = []

    class Extra(nn.Module):
        def forward(self, results, inputs, names):
            seen.extend([results, inputs, names])
            return [*results, results[0]], [*names, "again"]

    features = levels((8, 12), (4, 6), channels=(4, 6))
    got = FeaturePyramid([4, 6], 5, Extra())(features)
    assert got["again"] is got["c0"] and list(features) == ["c0", "c1"]
    assert [x.shape[1] for x in seen[0]] == [5, 5] and seen[1] == list(features.values()) and seen[2] == ["c0", "c1"]


def upsampler_macs(upsampler):
    """Multiply-adds of the three upsamplers of a detector on an image of 800 x 1280: levels of 1/32 to 1/4."""
    with torch.device("meta"):
        neck = FeaturePyramid([256, 512, 1024, 2048], 256, upsampler=upsampler)
        sizes = ((100, 160), (50, 80), (25, 40))
        inputs = [(torch.zeros(1, 256, h, w), (2 * h, 2 * w)) for h, w in sizes]

    class Call(nn.Module):
        def __init__(self, layer, size):
            super().__init__()
            self.layer, self.size = layer, size

        def forward(self, x):
            return self.layer(x, self.size)

    layers = zip(neck.upsamplers, inputs, strict=True)
    return sum(count_macs(Call(layer, size), x) for layer, (x, size) in layers)


def test_flops_of_the_upsamplers_are_those_of_the_paper():
    pixels = 100 * 160 + 50 * 80 + 25 * 40
    assert upsampler_macs("nearest") == upsampler_macs("bilinear") == 0
    assert upsampler_macs("carafe") / 1e9 == pytest.approx(2.14, rel=0.025)
    ours = upsampler_macs("ddf_up")
    # The authors' module has a depth-wise convolution for each of the four sub-positions; here all share one.
    assert (ours + 3 * 256 * 9 * pixels) / 1e9 == pytest.approx(0.58, abs=0.005)
    assert ours / 1e9 == pytest.approx(0.437, abs=0.001)
    assert upsampler_macs("deconvolution") == 256 * 256 * 16 * pixels
    assert upsampler_macs("pixel_shuffle") == 4 * 256 * 256 * 9 * pixels


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], 4), {}, r"in_channels_list must hold positive numbers; got \[\]"),
        (([4, 0], 4), {}, r"in_channels_list must hold positive numbers; got \[4, 0\]"),
        (([4], 0), {}, "out_channels must be at least 1; got 0"),
        (([4], 4), {"upsampler": "cubic"}, "upsampler must be one of nearest, .*, ddf_up; got 'cubic'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, options, message):
    with pytest.raises(ArgumentError, match=message):
        FeaturePyramid(*arguments, **options)


def test_a_wrong_number_of_levels_is_refused():
    with pytest.raises(ArgumentError, match="features must have 2 levels; got 3"):
        FeaturePyramid([4, 6], 5)(levels((8, 8), (4, 4), (2, 2)))
