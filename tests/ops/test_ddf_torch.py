"""The op within PyTorch: opcheck, gradcheck, compile, export, autocast; and its error messages."""

from __future__ import annotations

import pytest
import torch
from ddf_cases import FEW, Case, assert_close, make_inputs
from torch import Tensor

from ddfup.errors import ArgumentError
from ddfup.ops import ddf, ddf_up, reference

UP = {"scale": 2, "kernel_size": 3, "padding": "replicate"}


class Up(torch.nn.Module):
    def forward(self, features: Tensor, channel: Tensor, spatial: Tensor) -> Tensor:
        return ddf_up(features.relu(), channel, spatial, **UP) * 2


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_opcheck(case: Case, layout: str, device: str) -> None:
    inputs = make_inputs(case, torch.float32, device, layout)
    out = torch.ops.ddfup.ddf(*inputs, *case.options)
    for needs in ((True, True, True), (True, False, False), (False, True, True)):
        arguments = (torch.randn_like(out), *inputs, *case.options, *needs)
        torch.library.opcheck(torch.ops.ddfup.ddf_backward.default, arguments)
    leaves = tuple(value.requires_grad_() for value in inputs)
    torch.library.opcheck(torch.ops.ddfup.ddf.default, (*leaves, *case.options))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped_channels_last", "transposed"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 1, 1), (2, 1, 4, 5), (1, 2, 1, 5), (2, 4, 5, 1)])
def test_fake_strides_are_the_real_ones(shape: tuple[int, int, int, int], layout: str, device: str) -> None:
    case = Case(*shape, scale=2)
    inputs = make_inputs(case, torch.float32, device, layout)
    out = torch.ops.ddfup.ddf(*inputs, *case.options)
    grads = torch.ops.ddfup.ddf_backward(out, *inputs, *case.options, True, True, True)
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        fakes = [mode.from_tensor(value) for value in (*inputs, out)]
        fake_out = torch.ops.ddfup.ddf(*fakes[:3], *case.options)
        fake_grads = torch.ops.ddfup.ddf_backward(fakes[3], *fakes[:3], *case.options, True, True, True)
    plain = (
        reference.ddf(*inputs, *case.options),
        *reference.ddf_backward(out, *inputs, *case.options, *[True] * 3),
    )
    for real, fake, fallback in zip((out, *grads), (fake_out, *fake_grads), plain, strict=True):
        assert real.shape == fake.shape
        assert real.stride() == fake.stride() == fallback.stride()


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
@pytest.mark.parametrize("combine", ["mul", "add"])
def test_gradcheck(combine: str, padding: str, device: str) -> None:
    for case in (
        Case(1, 2, 2, 3, scale=2, heads=2, combine=combine, padding=padding),
        Case(1, 2, 3, 5, stride=2, dilation=2, combine=combine, padding=padding),
    ):
        leaves = tuple(value.requires_grad_() for value in make_inputs(case, torch.float64, device))
        assert torch.autograd.gradcheck(torch.ops.ddfup.ddf, (*leaves, *case.options))


# The compiler itself still uses what PyTorch deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile_in_one_graph(layout: str, device: str) -> None:
    torch._dynamo.reset()
    case = Case(scale=2, c=4, padding="replicate")
    leaves = tuple(value.requires_grad_() for value in make_inputs(case, torch.float32, device, layout))
    compiled = torch.compile(Up(), fullgraph=True)
    actual, expected = compiled(*leaves), Up()(*leaves)
    assert_close(actual, expected)
    assert actual.stride() == expected.stride()
    grad = torch.randn_like(expected)
    for first, second in zip(
        torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        assert_close(first, second)
        assert first.stride() == second.stride()


def test_compile_once_for_many_sizes() -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(Up(), fullgraph=True, dynamic=True, backend=count)
    for height, width in ((5, 7), (6, 9), (11, 4)):
        inputs = make_inputs(Case(h=height, w=width, scale=2), torch.float32)
        assert_close(compiled(*inputs), Up()(*inputs))
    assert graphs == 1


def test_export() -> None:
    case = Case(scale=2, padding="replicate")
    inputs = make_inputs(case, torch.float32)
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    sizes = ({2: height, 3: width}, None, {2: height, 3: width})
    program = torch.export.export(Up(), inputs, dynamic_shapes=sizes)
    assert any(node.target is torch.ops.ddfup.ddf.default for node in program.graph.nodes)
    other = make_inputs(case._replace(h=9, w=4), torch.float32)
    assert_close(program.module()(*other), Up()(*other))


def test_autocast_makes_the_dtypes_equal(device: str) -> None:
    features, channel, spatial = make_inputs(Case(scale=2), torch.float32, device)
    channel = channel.bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16):
        leaves = features.requires_grad_(), channel.requires_grad_(), spatial.requires_grad_()
        out = ddf_up(*leaves, **UP)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert [leaf.grad.dtype for leaf in leaves if leaf.grad is not None] == [leaf.dtype for leaf in leaves]
    with torch.autocast(device, enabled=False):
        assert ddf_up(features, channel.float(), spatial, **UP).dtype == torch.float32


def test_autocast_leaves_float64_alone(device: str) -> None:
    inputs = make_inputs(Case(scale=2), torch.float64, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ddf_up(*inputs, **UP).dtype == torch.float64


def test_second_order_gradients_are_refused_by_name() -> None:
    leaves = tuple(value.requires_grad_() for value in make_inputs(Case(scale=2)))
    (grad,) = torch.autograd.grad(ddf_up(*leaves, **UP).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"ddfup::ddf_backward has no derivative.*ddfup\.ops\.reference"):
        grad.sum().backward()


def test_the_reference_has_second_order_gradients() -> None:
    case = Case(1, 1, 2, 2, padding="replicate")
    leaves = tuple(value.requires_grad_() for value in make_inputs(case))
    assert torch.autograd.gradgradcheck(reference.ddf, (*leaves, *case.options))


def test_inference_mode_and_forward_without_gradient(device: str) -> None:
    inputs = tuple(value.requires_grad_() for value in make_inputs(Case(scale=2), torch.float32, device))
    with torch.inference_mode():
        out = ddf_up(*inputs, **UP)
    with torch.no_grad():
        assert torch.equal(out, ddf_up(*inputs, **UP))
    assert not out.requires_grad


F432 = (2, 4, 3, 5)
C33 = (2, 4, 3, 3)
S9 = (2, 9, 3, 5)
SPATIAL = r"spatial_filter must be \(N, heads\*K\*K, Ho, Wo\)"
UP_SPATIAL = r"spatial_filter must be \(N, S\*heads\*K\*K, H, W\)"
CHANNEL = r"channel_filter must be \(N, C, K, K\)"


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ((F432, C33, (2, 25, 3, 5)), {}, SPATIAL + r" = \(2, 9, 3, 5\); got \(2, 25, 3, 5\)"),
        ((F432, C33, S9), {"stride": 2}, r"spatial_filter must be .* = \(2, 9, 2, 3\); got \(2, 9, 3, 5\)"),
        ((F432, (2, 4, 5, 5), S9), {}, CHANNEL + r" = \(2, 4, 3, 3\); got \(2, 4, 5, 5\)"),
        ((F432, (1, 4, 3, 3), S9), {}, r"channel_filter must be .* = \(2, 4, 3, 3\); got \(1, 4, 3, 3\)"),
        ((F432[1:], C33, S9), {}, r"features must be \(N, C, H, W\) .* got \(4, 3, 5\)"),
        (((2, 4, 0, 5), C33, (2, 9, 0, 5)), {}, r"features must be .* at least 1; got \(2, 4, 0, 5\)"),
        ((F432, C33, S9), {"kernel_size": 4}, "kernel_size must be odd, .* got 4"),
        ((F432, C33, S9), {"kernel_size": 0}, "kernel_size must be at least 1; got 0"),
        ((F432, C33, S9), {"stride": 0}, "stride must be at least 1; got 0"),
        ((F432, C33, S9), {"dilation": -1}, "dilation must be at least 1; got -1"),
        ((F432, C33, S9), {"heads": 3}, "heads must divide the number of channels, 4; got 3"),
        ((F432, C33, S9), {"combine": "max"}, "combine must be 'mul' or 'add'; got 'max'"),
        ((F432, C33, S9), {"padding": "reflect"}, "padding must be 'zeros' or 'replicate'; got 'reflect'"),
    ],
)  # fmt: skip
def test_ddf_names_what_is_wrong(shapes: tuple[tuple[int, ...], ...], options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{message}$"):
        ddf(*(torch.zeros(shape) for shape in shapes), **{"kernel_size": 3, **options})


@pytest.mark.parametrize(
    ("channel", "spatial", "scale", "message"),
    [
        ((2, 9, 4, 3, 3), (2, 36, 3, 5), 2, r"channel_filter must be \(N, S, C, K, K\) = .*"),
        ((2, 4, 4, 3, 3), (2, 36, 6, 10), 2, UP_SPATIAL + r" = \(2, 36, 3, 5\); got .*"),
        ((2, 4, 4, 3, 3), (2, 36, 3, 5), 0, "scale must be at least 1; got 0"),
    ],
)  # fmt: skip
def test_ddf_up_names_what_is_wrong(
    channel: tuple[int, ...], spatial: tuple[int, ...], scale: int, message: str
) -> None:
    with pytest.raises(ArgumentError, match=f"^{message}$"):
        ddf_up(torch.zeros(F432), torch.zeros(channel), torch.zeros(spatial), scale=scale, kernel_size=3)


def test_dtypes_and_devices_must_agree() -> None:
    features, channel, spatial = (torch.zeros(shape) for shape in (F432, C33, S9))
    with pytest.raises(ArgumentError, match=r"^features must be float32, .*; got torch\.int64$"):
        ddf(features.long(), channel, spatial, kernel_size=3)
    with pytest.raises(
        ArgumentError, match=r"^spatial_filter must have the dtype of the features, .*float64$"
    ) as caught:
        ddf(features, channel, spatial.double(), kernel_size=3)
    assert caught.value.hint == "convert it with spatial_filter.to(features.dtype)"
    with pytest.raises(ArgumentError, match=r"^channel_filter must be on the device of the features, cpu; got meta$"):
        ddf(features, channel.to("meta"), spatial, kernel_size=3)


@pytest.mark.parametrize(
    "change",
    [
        {"spatial": (1, 1, 1, 1)},
        {"channel": (2, 1, 4, 5, 5)},
        {"options": (1, 2, 1, 1, 1, 0, 0)},
        {"options": (1, 3, 1, 1, 3, 0, 0)},
    ],
    ids=str,
)
def test_the_raw_op_never_reads_outside_its_inputs(change: dict[str, tuple[int, ...]], device: str) -> None:
    """Whoever bypasses `ddf` gets an error too, though a terser one."""
    features = torch.zeros(F432, device=device)
    channel = torch.zeros(change.get("channel", (2, 1, 4, 3, 3)), device=device)
    spatial = torch.zeros(change.get("spatial", S9), device=device)
    with pytest.raises(RuntimeError):
        torch.ops.ddfup.ddf(features, channel, spatial, *change.get("options", (1, 3, 1, 1, 1, 0, 0)))
