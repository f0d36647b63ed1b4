"""The parts that the default network is made of give the sums they name, whatever is overwritten on the way."""

import pytest
import torch
from torch.nn import functional as F

from ddfup.models.blocks import ChannelNorm, ResidualBlock, activation, add, add_pointwise, conv

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])


def image(channels, layout, seed=0):
    values = torch.randn(2, channels, 5, 7, generator=torch.Generator().manual_seed(seed))
    return values.to(memory_format=layout)


def randomize(layer):
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    return layer


def check(layer, x, own):
    """Compare with the definition, with and without gradients."""
    weight, bias = layer.weight.detach().double()[:, :, 0, 0], layer.bias.detach().double()
    expected = own.double() + torch.einsum("oi,nihw->nohw", weight, x.double()) + bias[:, None, None]
    before = x.clone()
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            result = add_pointwise(own.clone(memory_format=torch.preserve_format), x, layer)
        torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0)
        assert torch.equal(x, before)


@LAYOUTS
@pytest.mark.parametrize(("cin", "cout"), [(3, 16), (24, 24), (1, 5)])
def test_a_pointwise_convolution_is_added(cin, cout, layout):
    layer = randomize(conv(cin, cout, 1))
    check(layer, image(cin, layout), image(cout, layout, seed=1))
    # A part of a larger image, whose rows do not follow each other.
    check(layer, image(cin, layout)[..., 1:4, 2:6], image(cout, layout, seed=1)[..., 1:4, 2:6])


@torch.no_grad()
def test_the_sum_is_written_where_it_was_allowed():
    layer, own = randomize(conv(3, 4, 1)), image(4, torch.channels_last)
    assert add_pointwise(own, image(3, torch.channels_last), layer).data_ptr() == own.data_ptr()
    assert add(own, torch.ones_like(own)).data_ptr() == own.data_ptr()
    assert activation(own).data_ptr() == own.data_ptr()


def test_nothing_is_overwritten_while_gradients_are_kept():
    layer, own, x = randomize(conv(3, 4, 1)), image(4, torch.channels_last), image(3, torch.channels_last)
    before = own.clone()
    add_pointwise(own, x, layer)
    add(own, own)
    activation(own)
    assert torch.equal(own, before)
    # And they are right: of a sum over outputs they are ones, and sums over pixels.
    own.requires_grad_()
    add_pointwise(own, x, layer).sum().backward()
    assert torch.equal(own.grad, torch.ones_like(own))
    torch.testing.assert_close(layer.weight.grad[0, :, 0, 0], x.sum(dim=(0, 2, 3)))


@torch.no_grad()
def test_autocast_keeps_the_type_of_what_is_added_to():
    layer, own, x = randomize(conv(3, 4, 1)), image(4, torch.channels_last), image(3, torch.channels_last)
    expected = own + layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        result = add_pointwise(own.clone(memory_format=torch.preserve_format), x, layer)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, atol=0.05, rtol=0.02)


@LAYOUTS
@pytest.mark.parametrize("gradients", [True, False])
def test_a_residual_block_is_its_definition(layout, gradients):
    block, x = randomize(ResidualBlock(6)), image(6, layout)
    before = x.clone()
    with torch.set_grad_enabled(gradients):
        result = block(x)
    norm = F.layer_norm(x.permute(0, 2, 3, 1), (6,), block.norm.norm.weight, block.norm.norm.bias).permute(0, 3, 1, 2)
    hidden = F.leaky_relu(F.conv2d(norm, block.first.weight, block.first.bias, padding=1), 0.1)
    expected = x + F.conv2d(hidden, block.second.weight, block.second.bias, padding=1)
    torch.testing.assert_close(result, expected, atol=1e-3, rtol=1e-4)
    assert torch.equal(x, before)


@LAYOUTS
@torch.no_grad()
def test_normalised_channels_have_mean_zero_and_deviation_one(layout):
    result = ChannelNorm(8)(5 + 3 * image(8, layout))
    torch.testing.assert_close(result.mean(dim=1), torch.zeros(2, 5, 7), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.std(dim=1, correction=0), torch.ones(2, 5, 7), atol=1e-4, rtol=0)
