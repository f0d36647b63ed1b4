"""Layer normalisation of channels against its formula in float64, its gradients, and when native kernels serve."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

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


def test_the_kernel_serves_what_it_can_and_pytorch_the_rest(monkeypatch, device):
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
    assert used == (native_here and device == "cuda")
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


def test_the_ops_keep_the_rules_of_ops(device):
    native.load(device)
    rows, grad = torch.randn(2, 2, 5, 12, device=device)
    weight, bias = torch.randn(2, 12, device=device)
    torch.library.opcheck(torch.ops.ddfup.channel_norm_backward.default, (grad, rows, weight, 1e-5))
    for each in (rows, weight, bias):
        each.requires_grad_()
    torch.library.opcheck(torch.ops.ddfup.channel_norm.default, (rows, weight, bias, 1e-5))


def gradients(function, inputs, grad):
    inputs = [each.detach().requires_grad_() for each in inputs]
    return torch.autograd.grad(function(*inputs), inputs, grad)


def by_layer_norm(rows, weight, bias):
    return F.layer_norm(rows, weight.shape, weight, bias, 1e-3)


def by_op(rows, weight, bias):
    return torch.ops.ddfup.channel_norm(rows, weight, bias, 1e-3)


@pytest.mark.parametrize("channels", [1, 24, 48, 64, 255, 256])
@pytest.mark.parametrize("count", [0, 1, 37, 5003])
@pytest.mark.parametrize("layout", ["contiguous", "turned", "expanded"])
def test_gradients_of_the_op_are_those_of_layer_norm(channels, count, layout, device):
    native.load(device)
    rows = 3 * torch.randn(count, channels, device=device) + 5
    weight, bias = torch.randn(2, channels, device=device)
    grad = {
        "contiguous": torch.randn(count, channels),
        "turned": torch.randn(channels, count).T,
        "expanded": torch.randn(1, 1).expand(count, channels),
    }[layout].to(device)
    expected = gradients(by_layer_norm, [each.double() for each in (rows, weight, bias)], grad.double())
    for found, wanted in zip(gradients(by_op, (rows, weight, bias), grad), expected, strict=True):
        most = float(wanted.abs().max()) if wanted.numel() else 0.0
        # Sums over all rows may be small where their terms, and the errors of these, are not.
        terms = 1 if wanted.dim() > 1 else count
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-5 * max(1.0, most, terms**0.5))


@pytest.mark.parametrize("channels", [1, 24, 48, 64, 256, 300])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["last", "first"])
def test_training_is_that_of_layer_norm(channels, memory_format, device):
    inputs = make(channels, 37, 61, batch=2, memory_format=memory_format, device=device)
    grad = torch.randn(2, channels, 37, 61, device=device)
    found = gradients(lambda *inputs: channel_norm(*inputs, eps=1e-3), inputs, grad)
    wide = [each.double() for each in inputs]
    expected = gradients(lambda x, *rest: by_layer_norm(x.movedim(1, -1), *rest).movedim(-1, 1), wide, grad.double())
    for one, other in zip(found, expected, strict=True):
        terms = 1 if other.dim() > 1 else grad[:, 0].numel()
        most = max(1.0, float(other.abs().max()), terms**0.5)
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-5 * most)


def test_gradients_without_a_kernel_are_exact_in_float64():
    rows, grad = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    weight, bias = torch.randn(2, 5, dtype=torch.float64)
    found = torch.ops.ddfup.channel_norm_backward(grad, rows, weight, 1e-3)
    torch.testing.assert_close(found, gradients(by_layer_norm, (rows, weight, bias), grad))
    if not native.is_loaded("cpu"):  # the native kernel has no float64
        inputs = [each.requires_grad_() for each in (rows, weight, bias)]
        assert torch.autograd.gradcheck(by_op, inputs)


def test_second_order_gradients_are_refused_by_name():
    rows = torch.randn(3, 4, requires_grad=True)
    weight, bias = torch.randn(2, 4)
    (slope,) = torch.autograd.grad(by_op(rows, weight, bias).square().sum(), rows, create_graph=True)
    with pytest.raises(NotImplementedError, match="channel_norm_backward has no derivative"):
        slope.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_has_it_in_float32_on_a_gpu(dtype, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")
    features, weight, bias = make(24, 9, 13, device="cuda")
    features = features.to(dtype).requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cuda", dtype):
        used, result = served(monkeypatch, features, weight, bias)
        expected = F.layer_norm(features.permute(0, 2, 3, 1), weight.shape, weight, bias).permute(0, 3, 1, 2)
    assert used == native.is_loaded("cuda")
    assert result.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=0)
    grad = torch.randn_like(result)
    found, wanted = (torch.autograd.grad(each, (features, weight), grad) for each in (result, expected))
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grad", [torch.randn(5, 11), torch.randn(12, 5), torch.randn(5, 12).double()])
def test_the_kernel_refuses_a_gradient_of_something_else(grad):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")
    if not native.load("cuda"):
        pytest.skip("DDFUP_KERNELS=torch builds nothing")
    rows, weight = torch.randn(5, 12, device="cuda"), torch.randn(12, device="cuda")
    with pytest.raises(RuntimeError, match="grad does not fit the rows"):
        torch.ops.ddfup.channel_norm_backward(grad.cuda(), rows, weight, 1e-5)


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
