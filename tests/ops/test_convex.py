"""Filters that sum to one against their formula in float64, and when the native kernel serves."""

import numpy as np
import pytest
import torch

from ddfup.models.layers import SpatialFilterBranch
from ddfup.ops import convex, native
from ddfup.ops.convex import convex_filters


def make(channels, size, filters, taps, *, batch=1, memory_format=torch.channels_last, device="cpu", spread=1.0):
    generator = torch.Generator().manual_seed(channels)
    guidance = torch.randn(batch, channels, *size, generator=generator)
    weight = spread * torch.randn(filters * taps, channels, generator=generator)
    bias = spread * torch.randn(filters * taps, generator=generator)
    return guidance.to(device).contiguous(memory_format=memory_format), weight.to(device), bias.to(device)


def formula(guidance, weight, bias, taps):
    x, weight, bias = (values.double().cpu().numpy() for values in (guidance, weight, bias))
    logits = np.einsum("oc,nchw->nohw", weight, x) + bias[:, None, None]
    grouped = logits.reshape(len(x), -1, taps, *x.shape[2:])
    parts = np.exp(grouped - grouped.max(axis=2, keepdims=True))
    return (parts / parts.sum(axis=2, keepdims=True)).reshape(logits.shape)


# Numbers of pixels around those of a block (64 with the widest vectors) and of a piece (1024); taps that threes divide
# and do not.
@pytest.mark.parametrize("channels", [1, 3, 12, 24, 33])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 4), (9, 7), (37, 61)])
@pytest.mark.parametrize(("filters", "taps"), [(4, 9), (1, 25), (3, 1), (2, 4)])
@torch.no_grad()
def test_it_is_the_formula(channels, size, filters, taps, device):
    inputs = make(channels, size, filters, taps, device=device)
    result = convex_filters(*inputs, taps=taps)
    assert result.shape == (1, filters * taps, *size) and result.is_contiguous()
    np.testing.assert_allclose(result.cpu().numpy(), formula(*inputs, taps), atol=3e-6)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["last", "first"])
@torch.no_grad()
def test_batches_and_threads(memory_format, device):
    inputs = make(24, (70, 90), 4, 9, batch=3, memory_format=memory_format, device=device)
    np.testing.assert_allclose(convex_filters(*inputs, taps=9).cpu().numpy(), formula(*inputs, 9), atol=3e-6)


@pytest.mark.parametrize("spread", [0.0, 1e-4, 10.0, 1e3, 1e6])
@torch.no_grad()
def test_small_and_large_logits(spread, device):
    """Equal ones, and ones whose exponentials would overflow or vanish."""
    inputs = make(6, (9, 11), 4, 9, spread=spread, device=device)
    result = convex_filters(*inputs, taps=9)
    assert (result >= 0).all()
    torch.testing.assert_close(result.view(4, 9, -1).sum(dim=1), torch.ones(4, 99, device=device))
    # What rounding of the logits may change grows with them.
    np.testing.assert_allclose(result.cpu().numpy(), formula(*inputs, 9), atol=3e-6 * max(1, spread))


@torch.no_grad()
def test_relative_accuracy_over_the_range_of_the_exponential():
    bias = torch.zeros(4001)
    bias[1:] = torch.linspace(-80, 0, 4000)
    guidance = torch.zeros(1, 1, 1, 1)
    result = convex_filters(guidance, torch.zeros(4001, 1), bias, taps=4001)[0, :, 0, 0]
    np.testing.assert_allclose(result / result[0], bias.double().exp(), rtol=5e-7)


@torch.no_grad()
def test_what_is_not_finite_stays_in_its_pixel(device):
    guidance, weight, bias = make(12, (5, 9), 4, 9, device=device)
    expected = convex_filters(guidance, weight, bias, taps=9)
    for place, value in (((0, 3), torch.nan), ((2, 8), torch.inf), ((4, 8), torch.nan)):
        guidance[0, 5, place[0], place[1]] = value
        expected[0, :, place[0], place[1]] = torch.nan
    torch.testing.assert_close(convex_filters(guidance, weight, bias, taps=9), expected, equal_nan=True)


@torch.no_grad()
def test_no_pixels(device):
    guidance, weight, bias = make(12, (3, 4), 4, 9, device=device)
    assert convex_filters(guidance[:0], weight, bias, taps=9).shape == (0, 36, 3, 4)


def served(monkeypatch, *inputs):
    seen = []
    kernel = torch.ops.ddfup.convex_filters
    monkeypatch.setattr(torch.ops.ddfup, "convex_filters", lambda *args: seen.append(args) or kernel(*args))
    result = convex_filters(*inputs, taps=9)
    return bool(seen), result


def test_the_kernel_serves_inference_and_pytorch_the_rest(monkeypatch):
    inputs = make(12, (6, 7), 4, 9)
    native_here = native.load("cpu")
    with torch.no_grad():
        assert served(monkeypatch, *inputs)[0] == native_here
        assert not served(monkeypatch, *(x.double() for x in inputs))[0]
        used, result = served(monkeypatch, *(x.bfloat16() for x in inputs))
        # Of half precision the numbers would not sum to one.
        assert not used and result.dtype == torch.float32
        assert not served(monkeypatch, *make(12, (6, 7), 4, 9, memory_format=torch.contiguous_format))[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert not served(monkeypatch, *inputs)[0]
        with monkeypatch.context() as patch:
            patch.setattr(convex.native, "load", lambda device: False)
            assert not served(monkeypatch, *inputs)[0]
    inputs[1].requires_grad_()
    used, result = served(monkeypatch, *inputs)
    assert not used
    result[:, 0].sum().backward()
    assert inputs[1].grad is not None


@torch.no_grad()
def test_the_op_without_a_kernel_for_the_device_is_pytorchs():
    """Asked with a weight on a device that no kernel is for: not the op again and again."""
    guidance, weight, bias = make(12, (6, 7), 4, 9)
    result = torch.ops.ddfup.convex_filters(guidance.permute(0, 2, 3, 1), weight.to("meta"), bias, 9)
    assert result.shape == (guidance.shape[0], 36, *guidance.shape[2:])


@torch.no_grad()
def test_the_branch_of_a_module_uses_it(monkeypatch):
    branch = SpatialFilterBranch(12, 3, filters=4, normalization="softmax", stride=2)
    guidance = make(12, (6, 7), 4, 9)[0]
    weight, bias = branch.project.weight.flatten(1), branch.project.bias
    expected = formula(guidance[..., ::2, ::2], weight, bias, 9)
    np.testing.assert_allclose(branch(guidance), expected, atol=3e-6)


@torch.no_grad()
def test_compiled_and_alone_agree():
    inputs = make(12, (6, 7), 4, 9)
    compiled = torch.compile(convex_filters, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs, taps=9), convex_filters(*inputs, taps=9), atol=3e-6, rtol=0)


def test_the_op_keeps_the_rules_of_ops():
    arguments = (torch.randn(1, 2, 5, 12), torch.randn(36, 12), torch.randn(36), 9)
    torch.library.opcheck(
        torch.ops.ddfup.convex_filters.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("rows", "planes", "taps", "message"),
    [
        (torch.randn(1, 2, 12, 5).transpose(2, 3), 36, 9, "rows must be contiguous"),
        (torch.randn(1, 2, 5, 11), 36, 9, "a row for every tap"),
        (torch.randn(1, 2, 5, 12), 36, 7, "a row for every tap"),
        (torch.randn(1, 2, 5, 12), 36, 0, "a row for every tap"),
        (torch.randn(1, 2, 5, 12, dtype=torch.float64), 36, 9, "float32"),
    ],
    ids=["strided", "channels", "taps", "none", "dtype"],
)
def test_the_kernel_refuses_what_it_cannot_read(rows, planes, taps, message):
    if not native.load("cpu"):
        pytest.skip("DDFUP_KERNELS=torch builds nothing")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ddfup.convex_filters(rows, torch.randn(planes, 12), torch.randn(planes), taps)
