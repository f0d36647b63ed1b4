"""`ddf` and `ddf_up` against plain loops, and their gradients against autograd of the float64 formula."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from ddf_cases import CASES, FEW, LAYOUTS, TOLERANCE, Case, assert_close, loops, make_inputs
from torch import Tensor

from ddfup.ops import ddf, ddf_up, native, reference

HALF_OR_DOUBLE = (torch.float64, torch.float16, torch.bfloat16)


def run(case: Case, features: Tensor, channel: Tensor, spatial: Tensor) -> Tensor:
    """Call the public function that the case belongs to."""
    rest = {"dilation": case.dilation, "heads": case.heads, "combine": case.combine, "padding": case.padding}
    if case.scale > 1:
        return ddf_up(features, channel, spatial, scale=case.scale, kernel_size=case.k, **rest)
    return ddf(features, channel[:, 0], spatial, kernel_size=case.k, stride=case.stride, **rest)


def expected_gradients(
    case: Case, inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate the reference formula in float64 by plain autograd."""
    leaves = tuple(value.detach().double().requires_grad_() for value in inputs)
    return torch.autograd.grad(reference.ddf(*leaves, *case.options), leaves, grad.double())


def test_the_kernels_asked_for_are_the_ones_tested() -> None:
    run(CASES[0], *make_inputs(CASES[0]))
    assert native.status().cpu.loaded == (native.mode() != "torch")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_agrees_with_loops(case: Case) -> None:
    inputs = make_inputs(case)
    assert_close(reference.ddf(*inputs, *case.options), loops(case, *inputs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_result_agrees_with_loops(case: Case, device: str) -> None:
    inputs = make_inputs(case, torch.float32, device)
    assert_close(run(case, *inputs), loops(case, *inputs))


@pytest.mark.parametrize("dtype", HALF_OR_DOUBLE, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_every_dtype(case: Case, layout: str, dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs(case, dtype, device, layout)
    leaves = tuple(value.clone().requires_grad_() for value in inputs)
    out = run(case, *leaves)
    assert out.dtype == dtype
    assert_close(out, loops(case, *inputs))
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, grad)
    for name, actual, expected in zip("fcs", grads, expected_gradients(case, inputs, grad), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, expected, name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case: Case, device: str) -> None:
    inputs = make_inputs(case, torch.float32, device)
    leaves = tuple(value.requires_grad_() for value in inputs)
    out = run(case, *leaves)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, grad)
    for name, actual, expected in zip("fcs", grads, expected_gradients(case, inputs, grad), strict=True):
        assert_close(actual, expected, name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_layouts_change_nothing_but_the_layout(case: Case, layout: str, device: str) -> None:
    inputs = make_inputs(case, torch.float32, device, layout)
    leaves = tuple(value.detach().requires_grad_() for value in inputs)
    out = run(case, *leaves)
    assert_close(out, reference.ddf(*(value.double() for value in inputs), *case.options))
    wanted = torch.channels_last if "channels_last" in layout else torch.contiguous_format
    assert out.is_contiguous(memory_format=wanted)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, grad)
    for name, actual, expected in zip("fcs", grads, expected_gradients(case, inputs, grad), strict=True):
        assert_close(actual, expected, name)
    assert grads[0].is_contiguous(memory_format=wanted)


def test_gradient_of_the_output_may_have_any_strides(device: str) -> None:
    case = Case(scale=2, c=4, heads=2)
    inputs = make_inputs(case, torch.float32, device)
    shape = case.n, case.c, case.h * 2, case.w * 2
    for grad in (
        torch.ones((), device=device).expand(shape),
        torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last),
        torch.randn(*shape[:2], shape[3], shape[2], device=device).mT,
    ):
        leaves = tuple(value.detach().requires_grad_() for value in inputs)
        grads = torch.autograd.grad(run(case, *leaves), leaves, grad)
        for actual, expected in zip(grads, expected_gradients(case, inputs, grad), strict=True):
            assert_close(actual, expected)


@pytest.mark.parametrize("seed", range(60))
def test_random_cases(seed: int, device: str) -> None:
    pick = random.Random(seed)
    heads, scale = pick.choice((1, 1, 2)), pick.choice((1, 1, 2, 3))
    case = Case(
        n=pick.choice((1, 2)),
        c=heads * pick.choice((1, 3, 16, 17)),
        h=pick.choice((1, 2, 9, 16, 35)),
        w=pick.choice((1, 3, 15, 16, 17, 130, 330)),
        k=pick.choice((1, 3, 3, 5, 5, 7)) if scale < 3 else 3,
        scale=scale,
        stride=pick.choice((1, 2, 3)) if scale == 1 else 1,
        dilation=pick.choice((1, 1, 2, 3)),
        heads=heads,
        combine=pick.choice(("mul", "add")),
        padding=pick.choice(("zeros", "replicate")),
    )
    inputs = make_inputs(case, pick.choice(tuple(TOLERANCE)), device, pick.choice(LAYOUTS))
    out = torch.ops.ddfup.ddf(*inputs, *case.options)
    assert_close(out, reference.ddf(*(value.double() for value in inputs), *case.options), "output")
    grad = torch.randn_like(out)
    needs = tuple(pick.random() < 0.7 for _ in range(3))
    grads = torch.ops.ddfup.ddf_backward(grad, *inputs, *case.options, *needs)
    expected = expected_gradients(case, inputs, grad)
    for name, needed, actual, wanted in zip("fcs", needs, grads, expected, strict=True):
        if needed:
            assert_close(actual, wanted, name)
        else:
            assert actual.shape == (0,)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(n=1, c=22, h=400, w=256, scale=2),
        Case(n=1, c=32, h=300, w=257, scale=2),
        Case(n=1, c=41, h=260, w=999, combine="add"),
        Case(n=2, c=24, h=90, w=131, scale=4, heads=2, padding="replicate"),
        Case(n=1, c=18, h=600, w=3200, stride=2, dilation=2, heads=3),
    ],
    ids=str,
)
def test_outputs_too_large_for_the_caches(case: Case, dtype: torch.dtype, layout: str, device: str) -> None:
    """They take paths of their own, row by row, group by group of channels; rows on cache lines or across them."""
    inputs = make_inputs(case, dtype, device, layout)
    out = torch.ops.ddfup.ddf(*inputs, *case.options)
    assert_close(out, reference.ddf(*(value.double() for value in inputs), *case.options), "output")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("scale", [1, 2])
def test_empty_batch(scale: int, layout: str, device: str) -> None:
    case = Case(n=0, scale=scale)
    leaves = tuple(value.requires_grad_() for value in make_inputs(case, torch.float32, device, layout))
    out = run(case, *leaves)
    assert out.shape == (0, 3, 5 * scale, 7 * scale)
    for grad, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert grad.shape == leaf.shape


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_gradients_wanted_are_made(wanted: tuple[int, ...], device: str) -> None:
    case = Case(scale=2)
    inputs = make_inputs(case, torch.float32, device)
    for index in wanted:
        inputs[index].requires_grad_()
    out = run(case, *inputs)
    out.sum().backward()
    expected = expected_gradients(case, inputs, torch.ones_like(out))
    for index, value in enumerate(inputs):
        if index in wanted:
            assert value.grad is not None
            assert_close(value.grad, expected[index])
        else:
            assert value.grad is None


def test_spatial_ones_give_a_depthwise_convolution(device: str) -> None:
    features, weights = torch.randn(1, 4, 9, 11, device=device), torch.randn(1, 4, 3, 3, device=device)
    actual = ddf(features, weights, torch.ones(1, 9, 5, 6, device=device), kernel_size=3, stride=2)
    assert_close(actual, F.conv2d(features, weights[0, :, None], stride=2, padding=1, groups=4))


def test_channel_ones_give_carafe(device: str) -> None:
    """Content-aware reassembly: one normalised filter per high-resolution pixel, shared by the channels."""
    features = torch.randn(1, 4, 6, 5, device=device)
    filters = torch.randn(1, 4, 25, 6, 5, device=device).softmax(2)
    ones = torch.ones(1, 4, 4, 5, 5, device=device)
    actual = ddf_up(features, ones, filters.flatten(1, 2), scale=2, kernel_size=5)
    windows = F.unfold(features, 5, padding=2).reshape(1, 4, 25, 6, 5)
    expected = F.pixel_shuffle(torch.einsum("nckyx,npkyx->ncpyx", windows, filters).flatten(1, 2), 2)
    assert_close(actual, expected)


def test_sub_positions_are_interleaved(device: str) -> None:
    """With 1 x 1 filters whose value is the sub-position, the output spells it out."""
    position = torch.arange(9.0, device=device)
    out = ddf_up(
        torch.ones(1, 1, 2, 2, device=device),
        position.reshape(1, 9, 1, 1, 1),
        torch.ones(1, 9, 2, 2, device=device),
        scale=3,
        kernel_size=1,
    )
    assert torch.equal(out[0, 0], position.reshape(3, 3).repeat(2, 2))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_with_any_number_of_threads(dtype: torch.dtype, layout: str) -> None:
    case = Case(n=1, c=20, h=40, w=70, scale=2)
    inputs = make_inputs(case, dtype, layout=layout)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        out = torch.ops.ddfup.ddf(*inputs, *case.options)
        grads = torch.ops.ddfup.ddf_backward(out, *inputs, *case.options, True, True, True)
        results.append((out, *grads))
    # PyTorch's own sums, which the fallback uses, may split differently; the kernels' never do.
    for other in results[1 if native.mode() != "torch" else 2 :]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def test_half_types_round_like_pytorch() -> None:
    """Every float16 and bfloat16, times a third, is rounded as PyTorch's own conversion rounds it."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = every.view(dtype)
        values = values[values.isfinite()]
        image = values[: len(values) // 64 * 64].reshape(1, 1, -1, 64)
        one, third = torch.ones(1, 1, 1, 1, dtype=dtype), torch.full_like(image, 1.0 / 3)
        scaled = ddf(image, one, third, kernel_size=1)
        assert torch.equal(scaled, (image.float() * third.float()).to(dtype))


def test_infinities_and_nans_stay(device: str) -> None:
    image = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0], device=device)
    for dtype in TOLERANCE:
        one = torch.ones(1, 1, 1, 1, device=device, dtype=dtype)
        row = image.to(dtype).reshape(1, 1, 1, 4)
        out = ddf(row, one, torch.ones_like(row), kernel_size=1)
        assert torch.equal(out.nan_to_num(7.0), row.nan_to_num(7.0))


def test_inputs_are_not_changed(device: str) -> None:
    case = Case(scale=2, padding="replicate")
    inputs = make_inputs(case, torch.float32, device)
    before = [value.clone() for value in inputs]
    out = run(case, *(value.requires_grad_() for value in inputs))
    out.sum().backward()
    for value, old in zip(inputs, before, strict=True):
        assert torch.equal(value, old)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
@pytest.mark.parametrize("padding", ["zeros", "replicate"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(24, 32, 33, 128), (13, 64, 40, 132), (1, 96, 131, 488)])
def test_large_images_on_a_gpu(size, dtype, scale, heads, padding):
    batch, channels, height, width = size
    features = torch.randn(size, device="cuda").to(dtype)
    channel = torch.randn(batch, scale**2, channels, 3, 3, device="cuda").to(dtype)
    spatial = torch.randn(batch, scale**2 * heads * 9, height, width, device="cuda").to(dtype)

    def call(image):
        if scale == 1:
            return ddf(image, channel[:, 0], spatial, kernel_size=3, heads=heads, padding=padding)
        return ddf_up(image, channel, spatial, scale=scale, kernel_size=3, heads=heads, padding=padding)

    result = call(features)
    numbers = reference.REPLICATE if padding == "replicate" else reference.ZEROS
    wide = (features.double(), channel.double(), spatial.double())
    expected = reference.ddf(*wide, scale, 3, 1, 1, heads, reference.MUL, numbers)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
    assert (result - expected).abs().max() < tolerance * expected.abs().max()
    # Other kernels take what lies one element off (tests/ops/test_cuda_sources.py), and add in the same order.
    shifted = features.new_empty(features.numel() + 1)[1:].view_as(features).copy_(features)
    assert torch.equal(call(shifted), result)
