"""The modules of the paper: shapes, the formula by an independent path, the faults of the reference code."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddfup.errors import ArgumentError
from ddfup.models.layers import DDF, ChannelFilterBranch, DDFUp, FilterNorm, SpatialFilterBranch


def unfold_ddf(features, channel_filter, spatial_filter, kernel_size, stride=1, dilation=1, heads=1, combine="mul"):
    """The formula by im2col: another path than the op's shifted windows."""
    n, c, h, w = features.shape
    k2 = kernel_size**2
    pad = dilation * (kernel_size // 2)
    columns = F.unfold(features, kernel_size, dilation=dilation, padding=pad, stride=stride)
    ho, wo = -(-h // stride), -(-w // stride)
    columns = columns.view(n, heads, c // heads, k2, ho, wo)
    spatial = spatial_filter.view(n, heads, 1, k2, ho, wo)
    channel = channel_filter.reshape(n, heads, c // heads, k2, 1, 1)
    mixed = spatial * channel if combine == "mul" else spatial + channel
    return (columns * mixed).sum(3).view(n, c, ho, wo)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_filter_norm_gives_every_spatial_filter_mean_zero_and_the_gain_as_deviation(kernel_size):
    norm = FilterNorm(kernel_size)
    filters = norm(torch.randn(2, 7, 6, kernel_size**2, dtype=torch.float64) * 5 + 3)
    gain = math.sqrt(2) / kernel_size
    torch.testing.assert_close(filters.mean(-1), torch.zeros(2, 7, 6, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(filters.std(-1), torch.full((2, 7, 6), gain, dtype=torch.float64), atol=1e-6, rtol=0)


def test_filter_norm_learns_one_factor_per_value_of_a_channel_filter():
    norm = FilterNorm(3, channels=4)
    assert norm.alpha.shape == (4, 9)
    assert norm.alpha.requires_grad
    # Started at randn * gain / K: neither constant nor far from that size.
    torch.manual_seed(0)
    many = FilterNorm(3, channels=4000).alpha
    assert many.std().item() == pytest.approx(math.sqrt(2) / 3, rel=0.02)
    assert many.mean().item() == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_filter_norm_of_a_flat_filter_is_none(dtype):
    filters = torch.stack((torch.ones(9), torch.arange(9.0)))[None].to(dtype)
    result = FilterNorm(3)(filters)
    assert result.dtype == dtype and not result[0, 0].any()
    torch.testing.assert_close(result.float(), FilterNorm(3)(filters.float()), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kernel_size", [1, 2, 4])
def test_filter_norm_refuses_kernels_without_deviation_or_centre(kernel_size):
    with pytest.raises(ArgumentError, match=f"kernel_size must be odd and at least 3.*got {kernel_size}"):
        FilterNorm(kernel_size)


@pytest.mark.parametrize("size", [(8, 9), (7, 5), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("combine", ["mul", "add"])
def test_ddf_is_a_drop_in_for_a_convolution_of_the_same_stride(size, stride, combine):
    torch.manual_seed(0)
    module = DDF(12, 3, stride=stride, heads=3, combine=combine).double()
    x = torch.randn(2, 12, *size, dtype=torch.float64)
    got = module(x)
    assert got.shape == nn.Conv2d(12, 12, 3, stride=stride, padding=1).double()(x).shape
    expected = unfold_ddf(x, module.channel(x)[:, 0], module.spatial(x), 3, stride, heads=3, combine=combine)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("combine", ["mul", "add"])
def test_ddf_up_module_equals_one_ddf_per_sub_position_stacked_and_shuffled(combine):
    # The reference's DDFUpPack passed `head` where `kernel_combine` belongs; here every option arrives.
    torch.manual_seed(0)
    module = DDFUp(8, scale=3, kernel_size=3, guidance_channels=5, heads=2, dilation=2, combine=combine).double()
    x = torch.randn(2, 8, 6, 7, dtype=torch.float64)
    guidance = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    channel, spatial = module.channel(x), module.spatial(guidance).view(2, 9, 18, 6, 7)
    parts = [unfold_ddf(x, channel[:, i], spatial[:, i], 3, dilation=2, heads=2, combine=combine) for i in range(9)]
    expected = F.pixel_shuffle(torch.stack(parts, dim=2).flatten(1, 2), 3)
    torch.testing.assert_close(module(x, guidance), expected)


def test_ddf_up_module_packs_guidance_of_the_target_resolution():
    torch.manual_seed(0)
    module = DDFUp(4, scale=2, guidance_channels=3, guidance_scale=2)
    x, guidance = torch.randn(1, 4, 5, 6), torch.randn(1, 3, 10, 12)
    before = module(x, guidance)
    assert before.shape == (1, 4, 10, 12)
    # One guide pixel steers only the filters of the low-resolution pixel it lies in.
    guidance[:, :, 4, 6] += 1
    changed = (module(x, guidance) - before).abs().amax(dim=(0, 1)) > 0
    rows, columns = changed.nonzero(as_tuple=True)
    assert set(rows.tolist()) <= {4, 5} and set(columns.tolist()) <= {6, 7} and changed.any()


def test_ddf_up_module_without_guidance_guides_itself():
    module = DDFUp(4, scale=2)
    x = torch.randn(1, 4, 5, 6)
    assert module(x).shape == (1, 4, 10, 12)
    with pytest.raises(ArgumentError, match="made without guidance_channels"):
        module(x, x)


def test_ddf_up_module_names_missing_and_misfit_guidance():
    module = DDFUp(4, scale=2, guidance_channels=3, guidance_scale=2)
    x = torch.randn(1, 4, 5, 6)
    with pytest.raises(ArgumentError, match="guidance is missing"):
        module(x)
    with pytest.raises(ArgumentError, match=r"guidance must be \(N, C, 10, 12\); got \(1, 3, 5, 6\)"):
        module(x, torch.randn(1, 3, 5, 6))
    with pytest.raises(ArgumentError, match="guidance_scale must be 1 or scale = 2; got 4"):
        DDFUp(4, scale=2, guidance_channels=3, guidance_scale=4)


def test_options_after_the_sizes_are_keyword_only():
    with pytest.raises(TypeError):
        DDF(4, 3, 2)
    with pytest.raises(TypeError):
        DDFUp(4, 2)


def test_softmax_spatial_filters_sum_to_one_under_autocast_too():
    branch = SpatialFilterBranch(6, 3, filters=4, normalization="softmax")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        filters = branch(torch.randn(2, 6, 5, 7))
    assert filters.dtype == torch.float32
    torch.testing.assert_close(filters.view(2, 4, 9, 5, 7).sum(dim=2), torch.ones(2, 4, 5, 7))


def test_softmax_spatial_filters_are_convex_combinations():
    branch = SpatialFilterBranch(6, 3, filters=4, heads=2, normalization="softmax")
    filters = branch(torch.randn(2, 6, 5, 4)).view(2, 8, 9, 5, 4)
    assert (filters >= 0).all()
    torch.testing.assert_close(filters.sum(2), torch.ones(2, 8, 5, 4))


def test_unknown_normalization_is_refused():
    with pytest.raises(ArgumentError, match=r"normalization must be .* got 'sigmoid'"):
        SpatialFilterBranch(4, 3, normalization="sigmoid")


def test_channel_filters_depend_on_pooled_features_only():
    branch = ChannelFilterBranch(8, 3, filters=4)
    x = torch.randn(2, 8, 6, 6)
    assert branch(x).shape == (2, 4, 8, 3, 3)
    shuffled = x.flatten(2)[..., torch.randperm(36)].view_as(x)
    torch.testing.assert_close(branch(shuffled), branch(x), atol=1e-5, rtol=1e-5)


def test_kernel_of_one_works_without_normalisation():
    assert DDF(4, 1)(torch.randn(1, 4, 3, 5)).shape == (1, 4, 3, 5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DDF(30, 3, heads=2),
        lambda: DDFUp(30, scale=2),
        lambda: DDFUp(30, scale=2, guidance_channels=30),
    ],
)
def test_gradients_reach_every_parameter(make):
    # Wide and seeded: of a few hidden units behind a ReLU all may be silent by chance.
    torch.manual_seed(0)
    module = make()
    x = torch.randn(2, 30, 7, 8)
    guided = isinstance(module, DDFUp) and module.guided
    (module(x, x) if guided else module(x)).square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
