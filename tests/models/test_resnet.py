"""DDF-ResNet: its size against the paper's, the authors' checkpoints by an independent forward pass, timm."""

import math
import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddfup.errors import ArgumentError
from ddfup.models.flops import count_macs
from ddfup.models.layers import DDF
from ddfup.models.resnet import BasicBlock, Bottleneck, DDFResNet, ddf_resnet, published_to_own, register_timm

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def published_shapes(blocks, width=64, classes=1000):
    """Keys and shapes of the authors' files: those of a timm ResNet with a DDFPack for every `conv2`."""
    shapes = {}

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    def conv(name, cin, cout, size):
        shapes[f"{name}.weight"] = (cout, cin, size, size)

    conv("conv1", 3, width, 7)
    norm("bn1", width)
    channels = width
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        hidden = int(inner * 0.2)
        for number in range(count):
            at = f"layer{stage + 1}.{number}"
            conv(f"{at}.conv1", channels, inner, 1)
            norm(f"{at}.bn1", inner)
            for name, cin, cout in (
                ("spatial_branch.0", inner, 9),
                ("channel_branch.1", inner, hidden),
                ("channel_branch.3", hidden, 9 * inner),
            ):
                conv(f"{at}.conv2.{name}", cin, cout, 1)
                shapes[f"{at}.conv2.{name}.bias"] = (cout,)
            shapes[f"{at}.conv2.channel_branch.4.std"] = (9 * inner,)
            norm(f"{at}.bn2", inner)
            conv(f"{at}.conv3", inner, 4 * inner, 1)
            norm(f"{at}.bn3", 4 * inner)
            if number == 0:
                conv(f"{at}.downsample.0", channels, 4 * inner, 1)
                norm(f"{at}.downsample.1", 4 * inner)
            channels = 4 * inner
    shapes["fc.weight"] = (classes, channels)
    shapes["fc.bias"] = (classes,)
    return shapes


def published_state(blocks, width, classes):
    """Random values for those keys; deviations positive, everything of a size that keeps signals alive."""
    state = {}
    for key, shape in published_shapes(blocks, width, classes).items():
        fan = math.prod(shape[1:]) or 1
        value = torch.randn(shape, dtype=torch.float64) / math.sqrt(fan)
        state[key] = value.abs() + 0.5 if key.endswith(("running_var", "bn3.weight")) else value
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
    return state


def published_forward(state, blocks, images, combine):
    """What the authors' network computes, from their keys alone."""

    def conv(x, name, stride=1, padding=0):
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), stride, padding)

    def norm(x, name):
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts)

    def standardize(filters, axis):
        return (filters - filters.mean(axis, keepdim=True)) / (filters.std(axis, keepdim=True) + 1e-10)

    def ddf_pack(x, name, stride):
        n, c = x.shape[:2]
        spatial = standardize(conv(x, f"{name}.spatial_branch.0", stride), 1) * math.sqrt(2) / 3
        hidden = conv(x.mean((2, 3), keepdim=True), f"{name}.channel_branch.1").relu()
        channel = standardize(conv(hidden, f"{name}.channel_branch.3").view(n, c, 9), 2)
        channel = channel * state[f"{name}.channel_branch.4.std"].view(c, 9)
        rows, columns = spatial.shape[2:]
        windows = F.unfold(x, 3, padding=1, stride=stride).view(n, c, 9, rows, columns)
        channel, spatial = channel[..., None, None], spatial[:, None]
        return (windows * (channel * spatial if combine == "mul" else channel + spatial)).sum(2)

    x = F.max_pool2d(norm(conv(images, "conv1", 2, 3), "bn1").relu(), 3, 2, 1)
    for stage, count in enumerate(blocks):
        for number in range(count):
            at, stride = f"layer{stage + 1}.{number}", 2 if stage and not number else 1
            change = norm(conv(x, f"{at}.conv1"), f"{at}.bn1").relu()
            change = norm(ddf_pack(change, f"{at}.conv2", stride), f"{at}.bn2").relu()
            change = norm(conv(change, f"{at}.conv3"), f"{at}.bn3")
            shortcut = x if number else norm(conv(x, f"{at}.downsample.0", stride), f"{at}.downsample.1")
            x = (change + shortcut).relu()
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize(
    ("depth", "combine", "parameters", "macs", "tolerance"),
    [
        (18, None, 11.7, 1.8, 0.05),
        (50, None, 25.6, 4.1, 0.05),
        (101, None, 44.5, 7.8, 0.05),
        (18, "mul", 7.7, 0.4, 0.05),
        (50, "mul", 16.8, 2.3, 0.05),
        (50, "add", 16.8, 2.3, 0.05),
        # 4.03: mixing the filters and batch normalisation are not counted here; either would round it to 4.1.
        (101, "mul", 28.1, 4.1, 0.08),
    ],
)
def test_parameters_and_flops_are_those_of_the_paper(depth, combine, parameters, macs, tolerance):
    with torch.device("meta"):
        network, images = ddf_resnet(depth, combine=combine), torch.zeros(1, 3, 224, 224)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(parameters, abs=0.05)
    assert count_macs(network, images) / 1e9 == pytest.approx(macs, abs=tolerance)


def test_multiply_adds_are_counted_once_per_tap_and_output_value():
    assert count_macs(nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.zeros(2, 4, 8, 10)) == 2 * 4 * 6 * 9 * 4 * 5
    module, x = DDF(10, 5, stride=2), torch.zeros(1, 10, 8, 8)
    branches = 10 * 25 * 16 + 10 * 2 + 2 * 250
    assert count_macs(module, x) == branches + 25 * 10 * 16


@pytest.mark.parametrize("depth", [50, 101])
def test_keys_and_shapes_of_the_published_checkpoints_fit(depth):
    published = {key: torch.empty(shape, device="meta") for key, shape in published_shapes(BLOCKS[depth]).items()}
    with torch.device("meta"):
        network = ddf_resnet(depth)
    own = {key: value.shape for key, value in network.state_dict().items()}
    assert {key: value.shape for key, value in published_to_own(published).items()} == own
    assert "layer1.0.conv2.channel_branch.4.std" in published and "layer1.0.conv2.channel.norm.alpha" in own
    network.load_state_dict(published, assign=True)


@pytest.mark.parametrize("combine", ["mul", "add"])
@pytest.mark.parametrize("size", [(64, 64), (37, 50)])
def test_a_published_checkpoint_computes_what_the_authors_network_does(combine, size):
    torch.manual_seed(0)
    blocks = (1, 2, 1)
    state = published_state(blocks, 10, 7)
    kept = dict(state)
    network = DDFResNet(blocks, width=10, combine=combine, num_classes=7).double().eval()
    network.load_state_dict(state)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = published_forward(state, blocks, images, combine)
    assert expected.std() > 0.01
    torch.testing.assert_close(network(images), expected)
    assert state.keys() == kept.keys() and all(state[key] is kept[key] for key in kept)


def test_a_network_inside_another_loads_published_keys_too():
    network = nn.Sequential(DDFResNet((1,), width=10, num_classes=3).double())
    state = published_state((1,), 10, 3)
    network.load_state_dict({f"0.{key}": value for key, value in state.items()})
    key = "layer1.0.conv2.channel_branch.4.std"
    assert torch.equal(network[0].layer1[0].conv2.channel.norm.alpha.flatten(), state[key])


def test_own_keys_load_and_what_does_not_fit_is_refused():
    network = DDFResNet((1,), width=10, num_classes=3)
    state = network.state_dict()
    DDFResNet((1,), width=10, num_classes=3).load_state_dict(state)
    state["layer1.0.conv2.unknown_branch.0.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="unknown_branch"):
        network.load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        network.load_state_dict(published_state((1,), 20, 3))


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (1, 1)])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_every_stage_has_the_size_of_the_ordinary_network(block, size):
    images = torch.randn(2, 3, *size)
    options = {"block": block, "width": 8, "num_classes": 5}
    dynamic, ordinary = (DDFResNet((1, 1, 2), combine=c, **options).eval() for c in ("mul", None))
    maps = dynamic.features(images)
    assert [v.shape for v in maps.values()] == [v.shape for v in ordinary.features(images).values()]
    assert list(maps) == ["layer1", "layer2", "layer3"]
    for level, info in zip(maps.values(), dynamic.feature_info[1:], strict=True):
        shape = [-(-side // info["reduction"]) for side in size]
        assert level.shape == (2, info["num_chs"], *shape)
    assert dynamic(images).shape == (2, 5)


def test_a_dynamic_filter_stands_for_every_3x3_convolution_of_the_blocks():
    for depth in (18, 50):
        with torch.device("meta"):
            ordinary, dynamic = ddf_resnet(depth, combine=None), ddf_resnet(depth, combine="add")
        kinds = {}
        for name, module in ordinary.named_modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                kinds[name] = module.stride[0]
        # In a basic block a 1 x 1 convolution follows, as number 1 of a sequence.
        found = {n.removesuffix(".0") if depth == 18 else n: m for n, m in dynamic.named_modules() if type(m) is DDF}
        assert {name: module.stride for name, module in found.items()} == kinds
        assert {module.combine for module in found.values()} == {"add"}


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("combine", ["mul", "add", None])
def test_gradients_reach_every_parameter(kind, combine):
    torch.manual_seed(0)
    name = "basic" if kind is BasicBlock else "bottleneck"
    network = DDFResNet((1, 1), block=name, combine=combine, width=30, stem="small", num_classes=3, in_chans=1)
    for module in network.modules():
        if isinstance(module, kind):
            nn.init.ones_(module.last_norm.weight)
    network(torch.randn(4, 1, 8, 8)).square().mean().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


def test_a_new_block_passes_its_input_on():
    network = DDFResNet((2, 1), width=10, num_classes=3).eval()
    x = torch.rand(1, 40, 5, 6)
    assert torch.equal(network.layer1[1](x), x)


def test_small_images_keep_their_resolution():
    network = DDFResNet((1, 1), block="basic", width=8, stem="small", num_classes=4, in_chans=1)
    assert [tuple(v.shape[2:]) for v in network.features(torch.zeros(2, 1, 8, 8)).values()] == [(8, 8), (4, 4)]


def test_the_classifier_can_be_dropped_and_replaced():
    torch.manual_seed(0)
    network = DDFResNet((1,), width=10, num_classes=4, drop_rate=0.5).eval()
    images = torch.randn(2, 3, 40, 40)
    scores, maps = network(images), network.forward_features(images)
    pooled = maps.mean((2, 3))
    torch.testing.assert_close(network.forward_head(maps, pre_logits=True), pooled)
    torch.testing.assert_close(scores, pooled @ network.fc.weight.T + network.fc.bias)
    assert network.get_classifier() is network.fc
    network.reset_classifier(0)
    torch.testing.assert_close(network(images), pooled)
    network.reset_classifier(9)
    assert network(images).shape == (2, 9) and network.num_classes == 9
    # Dropout takes half of the pooled features and doubles the others.
    dropped = network.train().forward_head(maps, pre_logits=True)
    assert ((dropped == 0) | torch.isclose(dropped, 2 * pooled)).all() and (dropped == 0).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": ()}, r"blocks must be .*; got \(\)"),
        ({"blocks": (2, 0)}, r"blocks must be .*; got \(2, 0\)"),
        ({"block": "wide"}, "block must be 'basic' or 'bottleneck'; got 'wide'"),
        ({"combine": "sum"}, "combine must be 'mul', 'add' or None; got 'sum'"),
        ({"se_ratio": 0.0}, "se_ratio must be positive; got 0.0"),
        ({"stem": "deep"}, "stem must be 'imagenet' or 'small'; got 'deep'"),
        ({"width": 0}, "width must be at least 1; got 0"),
        ({"in_chans": 0}, "in_chans must be at least 1; got 0"),
        ({"num_classes": -1}, "num_classes must not be negative; got -1"),
        ({"drop_rate": 1.0}, "drop_rate must be at least 0 and below 1; got 1.0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        DDFResNet(**{"blocks": (1,), **options})


def test_unknown_depths_are_refused():
    with pytest.raises(ArgumentError, match="depth must be one of 18, 50, 101; got 34"):
        ddf_resnet(34)


@pytest.fixture
def fresh_entries(monkeypatch):
    """As if nobody had registered anything yet."""
    monkeypatch.delitem(sys.modules, "ddfup.models.timm_entries", raising=False)
    yield
    sys.modules.pop("ddfup.models.timm_entries", None)


def test_without_timm_registering_says_what_to_install(monkeypatch, fresh_entries):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models", None)
    with pytest.raises(ArgumentError, match="timm cannot be imported") as error:
        register_timm()
    assert "ddfup[timm]" in error.value.hint


def test_entries_are_registered_once_under_their_names(monkeypatch, fresh_entries):
    registered = {}
    timm = ModuleType("timm.models")
    timm.generate_default_cfgs = lambda table: {name.partition(".")[0]: entry for name, entry in table.items()}
    timm.register_model = lambda entry: registered.setdefault(entry.__name__, entry)
    timm.build_model_with_cfg = lambda make, name, pretrained, **options: make(**options)
    monkeypatch.setitem(sys.modules, "timm", ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.models", timm)
    names = register_timm()
    assert sorted(names) == sorted(f"ddf_{c}_resnet{d}" for c in ("mul", "add") for d in (18, 50, 101))
    assert register_timm() == names == list(registered)
    module = sys.modules["ddfup.models.timm_entries"]
    for name, entry in registered.items():
        assert getattr(module, name) is entry and name in module.default_cfgs
    with torch.device("meta"):
        network = registered["ddf_add_resnet101"](num_classes=5)
    assert len(network.layer3) == 23 and network.layer3[0].conv2.combine == "add" and network.fc.out_features == 5


def test_timm_builds_them(fresh_entries):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    register_timm()
    assert len(timm.list_models("ddf_*")) == 6
    backbone = timm.create_model("ddf_mul_resnet18", features_only=True, out_indices=(1, 2, 3, 4))
    assert [v.shape[1:] for v in backbone.eval()(torch.zeros(1, 3, 32, 32))] == [
        (64, 8, 8),
        (128, 4, 4),
        (256, 2, 2),
        (512, 1, 1),
    ]
