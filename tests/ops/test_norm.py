"""Layer normalisation of channels against its formula in float64, and when the native kernel serves."""

import numpy as np
import pytest
import torch

from ddfup.ops import native, norm
from ddfup.ops.norm import channel_norm


def make(channels, height, width, *, batch=1, memory_format=torch.channels_last, device="cpu"):
    generator = torch.Generator().manual_seed(channels)
    features = 3 * torch.randn(batch, channels, height, width, generator=generator) + 5
    weight, bias = torch.randn(2, channels, generator=generator)
    return features.to(device).contiguous(memory_format=memory_format), weight.to(device), bias.to(device)


def formula(features, weight, bias, eps):
    x = features.double().cpu().numpy()
    centred = x - x.mean(axis=1, keepdims=True)
    normalized = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps)
    weight, bias = (values.double().cpu().numpy()[:, None, None] for values in (weight, bias))
    return normalized * weight + bias


# Around the widths of vectors (4, 8, 16), in numbers of pixels that fill the last block of rows and do not.
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7, 8, 12, 15, 16, 17, 24, 31, 32, 48, 64, 100, 256, 300])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 4), (37, 61)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["last", "first"])
@torch.no_grad()
def test_it_is_the_formula(channels, size, memory_format, device):
    inputs = make(channels, *size, memory_format=memory_format, device=device)
    result = channel_norm(*inputs, eps=1e-3)
    np.testing.assert_allclose(result.cpu().numpy(), formula(*inputs, 1e-3), atol=2e-5)


@pytest.mark.parametrize("channels", [3, 12, 16, 33])
@torch.no_grad()
def test_batches_and_threads(channels, device):
    inputs = make(channels, 70, 90, batch=2, device=device)
    np.testing.assert_allclose(channel_norm(*inputs).cpu().numpy(), formula(*inputs, 1e-5), atol=2e-5)


@pytest.mark.parametrize("value", [0.0, -3.0, 1e4])
@torch.no_grad()
def test_equal_channels_give_the_bias(value):
    _, weight, bias = make(12, 5, 9)
    features = torch.full((1, 12, 5, 9), value).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(channel_norm(features, weight, bias), bias[:, None, None].expand(1, 12, 5, 9))


@torch.no_grad()
def test_what_is_not_finite_stays_in_its_pixel(device):
    features, weight, bias = make(12, 5, 9, device=device)
    expected = channel_norm(features, weight, bias)
    for place, value in (((0, 3), torch.nan), ((2, 8), torch.inf), ((4, 8), torch.nan)):
        features[0, 5, place[0], place[1]] = value
        expected[0, :, place[0], place[1]] = torch.nan
    torch.testing.assert_close(channel_norm(features, weight, bias), expected, equal_nan=True)


@torch.no_grad()
def test_no_pixels(device):
    features, weight, bias = make(12, 3, 4, device=device)
    assert channel_norm(features[:0], weight, bias).shape == (0, 12, 3, 4)


def served(monkeypatch, *inputs):
    seen = []
    kernel = torch.ops.ddfup.channel_norm
    monkeypatch.setattr(torch.ops.ddfup, "channel_norm", lambda *args: seen.append(args) or kernel(*args))
    result = channel_norm(*inputs)
    return bool(seen), result


def test_the_kernel_serves_inference_and_pytorch_the_rest(monkeypatch, device):
    inputs = make(12, 6, 7, device=device)
    native_here = native.load(device)
    with torch.no_grad():
        assert served(monkeypatch, *inputs)[0] == native_here
        assert not served(monkeypatch, *(x.double() for x in inputs))[0]
        assert not served(monkeypatch, *make(12, 6, 7, memory_format=torch.contiguous_format, device=device))[0]
        assert served(monkeypatch, *make(257, 6, 7, device=device))[0] == (native_here and device == "cpu")
        with monkeypatch.context() as patch:
            patch.setattr(norm.native, "load", lambda device: False)
            assert not served(monkeypatch, *inputs)[0]
    inputs[1].requires_grad_()
    used, result = served(monkeypatch, *inputs)
    assert not used
    result.sum().backward()
    assert inputs[1].grad is not None


@torch.no_grad()
def test_tensors_on_several_devices_are_not_for_the_kernel(device):
    """Its pointers would be another device's; PyTorch says what is wrong."""
    features, weight, bias = make(12, 6, 7, device=device)
    with pytest.raises(RuntimeError):
        channel_norm(features, weight.to("meta"), bias)
    assert not native.serves_inference(weight, bias.to("meta"))


@torch.no_grad()
def test_compiled_and_alone_agree():
    inputs = make(12, 6, 7)
    compiled = torch.compile(channel_norm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), channel_norm(*inputs), atol=2e-5, rtol=0)


def test_the_op_keeps_the_rules_of_ops():
    rows = torch.randn(2, 5, 12)
    arguments = (rows, torch.randn(12), torch.randn(12), 1e-5)
    torch.library.opcheck(
        torch.ops.ddfup.channel_norm.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("rows", "weight", "message"),
    [
        (torch.randn(12, 5).T, torch.randn(12), "rows must be contiguous"),
        (torch.randn(5, 12), torch.randn(11), "one value per channel"),
        (torch.randn(5, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64), "float32"),
    ],
    ids=["strided", "length", "dtype"],
)
def test_the_kernel_refuses_what_it_cannot_read(rows, weight, message):
    if not native.load("cpu"):
        pytest.skip("DDFUP_KERNELS=torch builds nothing")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ddfup.channel_norm(rows, weight, weight.clone(), 1e-5)
