"""Weight files: round trips, damage of every kind, and what every bundled model must be and do.

After a change of an architecture or new bundled weights, write the frozen keys and golden outputs anew:
``PYTHONPATH=.:tests:tests/models python -c "import test_weights; test_weights.freeze()"``
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import TINY_PYRAMID, pair, tiny_ddfupnet, tiny_pyramid
from safetensors.numpy import load_file, save_file

import ddfup
from ddfup import demo, models
from ddfup.degrade import degrade, resize
from ddfup.errors import WeightsError
from ddfup.inference import Upsampler
from ddfup.metrics import rmse

FROZEN = Path(__file__).with_name("frozen_keys.json")
GOLDEN = Path(__file__).with_name("golden.json")
ARCHITECTURES = ["ddfupnet", "pyramid"]
BUNDLED = models.list_models()


def frozen_keys(architecture):
    state = models.build(architecture, {}).state_dict()
    return {key: list(state[key].shape) for key in sorted(state)}


def golden_output(name):
    """A few pixels of what a model makes of a scene that is a formula."""
    y, x = np.mgrid[0:96, 0:128] / 96
    edge = np.where(x + 0.3 * np.sin(4 * y) > 0.7, 1.0, 0.0)
    depth = 2 + edge + 0.3 * y
    guide = np.stack([0.2 + 0.6 * edge, 0.5 + 0.3 * np.sin(9 * x), 0.5 + 0.4 * np.cos(7 * y)], axis=-1)
    result = Upsampler(name, device="cpu")(degrade(depth, 8, "bicubic"), guide.astype(np.float32))
    return [[round(float(value), 4) for value in row] for row in result[5::16, 5::16]]


def freeze():
    keys = {architecture: frozen_keys(architecture) for architecture in ARCHITECTURES}
    lines = json.dumps(keys, sort_keys=True).replace("], ", "],\n ").replace("{", "{\n ").replace("}", "\n}")
    FROZEN.write_text(lines + "\n", "utf-8")
    golden = {info.name: golden_output(info.name) for info in models.list_models()}
    GOLDEN.write_text(json.dumps(golden, sort_keys=True) + "\n", "utf-8")


# --- bundled weights ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_keys_of_an_architecture_are_frozen(architecture):
    # Weight files are for ever: a renamed or resized layer makes them all unreadable.
    frozen = json.loads(FROZEN.read_text("utf-8"))[architecture]
    assert frozen_keys(architecture) == frozen


@pytest.mark.parametrize("info", BUNDLED, ids=lambda info: info.name)
def test_bundled_weights_are_whole_and_say_what_they_are(info):
    models.verify(info)
    network = models.load_model(info.name)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == info.parameters
    assert info.path.name == f"{info.architecture}_{info.name}.safetensors"
    assert info.description and len(info.sha256) == 64


@pytest.mark.parametrize("info", BUNDLED, ids=lambda info: info.name)
def test_bundled_models_give_their_golden_output(info):
    golden = json.loads(GOLDEN.read_text("utf-8"))
    assert info.name in golden, "see the top of this file"
    np.testing.assert_allclose(golden_output(info.name), golden[info.name], atol=2e-3)


@pytest.mark.parametrize("info", BUNDLED, ids=lambda info: info.name)
def test_bundled_models_beat_bicubic_on_the_demo_scene(info):
    guide, truth = demo.load_pair()
    factor = info.config.get("scale", 8)
    # The paper's protocol for its network: one pixel per cell. Everything, for the default one.
    for kind in ("nearest",) if "scale" in info.config else ("bicubic", "nearest"):
        low = degrade(truth, factor, kind)
        error = rmse(Upsampler(info.name, device="cpu")(low, guide, fill=True), truth)
        plain = rmse(resize(low, truth.shape, "bicubic"), truth)
        assert error < plain, kind


@pytest.mark.parametrize("name", ["base", "small"])
def test_tiles_equal_the_whole(name):
    guide, truth = demo.load_pair()
    low = degrade(truth, 8, "area")
    whole, tiled = (Upsampler(name, device="cpu", tile=tile)(low, guide, fill=True) for tile in ("none", 256))
    assert 0 < np.abs(tiled - whole).max() <= 1e-5 * np.ptp(whole)


def test_the_default_model_comes_first():
    names = [info.name for info in BUNDLED]
    assert len(set(names)) == len(names)
    assert not names or names[0] == models.DEFAULT_MODEL


def test_models_are_listed_without_torch():
    code = "import sys; from ddfup import models; models.list_models(); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(ddfup.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr


# --- files ---


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "pyramid_tiny.safetensors"
    models.save_weights(path, tiny_pyramid(), architecture="pyramid", name="tiny", description="one line")
    return path


def rewrite(path, *, metadata=(), change=None):
    """Write a weight file anew with other metadata or tensors, its checksum made to fit."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        facts = file.metadata()
    tensors = load_file(path)
    if change is not None:
        change(tensors)
    facts["tensors_sha256"] = models._tensors_sha256(tensors)
    facts.update(metadata)
    save_file(tensors, path, {key: value for key, value in facts.items() if value is not None})


def test_weights_of_before_the_evidence_was_weighed_do_without_it(weights):
    rewrite(weights, change=lambda t: (t.pop("consistency.evidence.weight"), t.pop("consistency.steps")))
    network = models.load_model(weights)
    expected = tiny_pyramid()
    torch.nn.init.zeros_(expected.consistency.evidence.weight)
    expected.consistency.steps = torch.nn.Parameter(torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 4))
    depth, guide = pair((6, 8), (48, 64))
    with torch.no_grad():
        assert torch.equal(network(depth, guide), expected(depth, guide))
        # What it is trained to weigh makes a difference.
        assert not torch.equal(network(depth, guide), tiny_pyramid()(depth, guide))


def test_saved_weights_come_back_with_all_that_is_needed(weights):
    network = models.load_model(weights)
    for (key, saved), (other, loaded) in zip(
        tiny_pyramid().state_dict().items(), network.state_dict().items(), strict=True
    ):
        assert key == other and torch.equal(saved, loaded)
    assert network.config == TINY_PYRAMID
    info = models.read_info(weights)
    assert (info.name, info.architecture, info.description) == ("tiny", "pyramid", "one line")
    depth, guide = pair((6, 8), (24, 32))
    with torch.no_grad():
        assert torch.equal(network(depth, guide), tiny_pyramid()(depth, guide))
    assert weights.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in weights.parent.iterdir()] == [weights.name]


def test_equal_weights_are_equal_files(weights):
    before = weights.read_bytes()
    for _ in range(3):
        models.save_weights(weights, tiny_pyramid(), architecture="pyramid", name="tiny", description="one line")
        assert weights.read_bytes() == before


@pytest.mark.parametrize("make", [tiny_pyramid, tiny_ddfupnet])
def test_channels_last_weights_are_saved_as_they_are(tmp_path, make):
    # Their memory is not in the order of their indices, and networks are trained so.
    architecture = "pyramid" if make is tiny_pyramid else "ddfupnet"
    network = make().to(memory_format=torch.channels_last)
    path = tmp_path / "w.safetensors"
    models.save_weights(path, network, architecture=architecture, name="x", description="")
    loaded = models.load_model(path).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in network.state_dict().items())


def test_an_interrupted_save_leaves_the_old_file(weights, monkeypatch):
    before = weights.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        models.save_weights(weights, tiny_pyramid(1), architecture="pyramid", name="x", description="")
    assert weights.read_bytes() == before
    assert [path.name for path in weights.parent.iterdir()] == [weights.name]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(path):
    path.write_bytes(path.read_bytes()[:20])


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def other_sha(path):
    rewrite(path, metadata={"tensors_sha256": "0" * 64})


def make_pickle(path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (path.with_name("fired"),)

    path.write_bytes(pickle.dumps(Bomb()))


def make_torch_file(path):
    torch.save({"weight": torch.zeros(3)}, path)


def foreign(path):
    save_file({"weight": np.zeros(3, np.float32)}, path)


def with_nan(path):
    def change(tensors):
        next(iter(tensors.values())).flat[0] = np.nan

    rewrite(path, change=change)


def without_a_tensor(path):
    rewrite(path, change=lambda tensors: tensors.pop(sorted(tensors)[0]))


def wrong_shape(path):
    def change(tensors):
        key = sorted(tensors)[0]
        tensors[key] = np.zeros(tensors[key].size + 1, np.float32)

    rewrite(path, change=change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "no such weight file"),
        (truncate, "cannot read the weights"),
        (cut_header, "cannot read the weights"),
        (lambda path: path.write_bytes(b""), "cannot read the weights"),
        (flip_byte, "do not match their sha256"),
        (other_sha, "do not match their sha256"),
        (make_pickle, "cannot read the weights"),
        (make_torch_file, "cannot read the weights"),
        (foreign, "not a ddfup weight file"),
        (with_nan, "holds NaN or infinity"),
        (without_a_tensor, "do not fit the architecture 'pyramid'"),
        (wrong_shape, "do not fit the architecture 'pyramid'"),
        (lambda p: rewrite(p, metadata={"architecture": "ddfupnet"}), "config does not fit the architecture"),
        (
            lambda p: rewrite(p, metadata={"architecture": "unet"}),
            "architecture must be one of .*; got 'unet'",
        ),
        (lambda p: rewrite(p, metadata={"architecture": None}), "metadata are damaged"),
        (lambda p: rewrite(p, metadata={"config": "{"}), "metadata are damaged"),
        (lambda p: rewrite(p, metadata={"config": "[1]"}), "metadata are damaged"),
        (lambda p: rewrite(p, metadata={"config": '{"size": 3}'}), "config does not fit the architecture"),
        (
            lambda p: rewrite(p, metadata={"config": '{"trunk_channels": "x"}'}),
            "do not make a 'pyramid' network",
        ),
        (
            lambda p: rewrite(p, metadata={"config": '{"trunk_channels": -3}'}),
            "do not make a 'pyramid' network",
        ),
        # Layers that would take minutes to make.
        (
            lambda p: rewrite(p, metadata={"config": '{"stage_blocks": [200000, 1]}'}),
            r"stage_blocks in its metadata must be of the size of its tensors, at most \d+; got 200000",
        ),
        (lambda p: rewrite(p, metadata={"config": '{"trunk_blocks": 1e9}'}), "must be of the size of its tensors"),
    ],
)
def test_damaged_weights_are_refused(weights, damage, message):
    damage(weights)
    with pytest.raises(WeightsError, match=message) as caught:
        models.load_model(weights)
    assert caught.value.exit_code == 7
    assert str(weights) in caught.value.message
    assert not (weights.parent / "fired").exists()


def test_a_bad_scale_in_the_file_is_the_files_fault(tmp_path):
    path = tmp_path / "w.safetensors"
    models.save_weights(path, tiny_ddfupnet(), architecture="ddfupnet", name="x", description="")
    rewrite(path, metadata={"config": '{"scale": 3}'})
    with pytest.raises(WeightsError, match="do not make a 'ddfupnet' network: scale must be 2, 4, 8 or 16; got 3"):
        models.load_model(path)


def test_weights_of_another_size_do_not_fit(weights):
    rewrite(weights, metadata={"config": json.dumps({**vars(TINY_PYRAMID), "trunk_channels": 9})})
    with pytest.raises(WeightsError, match="do not fit the architecture 'pyramid'"):
        models.load_model(weights)


def test_a_folder_is_no_weight_file(tmp_path):
    with pytest.raises(WeightsError, match="cannot read the weights"):
        models.load_model(tmp_path)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(WeightsError, match="no model named 'bsae'") as caught:
        models.load_model("bsae")
    for info in BUNDLED:
        assert info.name in caught.value.hint


def test_an_unknown_architecture_or_size_is_named():
    with pytest.raises(WeightsError, match="architecture must be one of pyramid, ddfupnet; got 'unet'"):
        models.build("unet", {})
    with pytest.raises(WeightsError, match=r"config does not fit the architecture 'pyramid'.*depth"):
        models.build("pyramid", {"depth": 3})
