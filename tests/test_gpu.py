"""Networks, memory, training and commands on an NVIDIA GPU, against the CPU; skipped where there is none.

What the op itself gives there is tested in ops/.
"""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from networks import tiny_pyramid

from ddfup import cli, graphs, models
from ddfup.graphs import Graph, Recorder
from ddfup.inference import Upsampler
from ddfup.metrics import rmse
from ddfup.training.config import DataSection, DataSet, ModelSection, OptimizationSection, TrainingConfig
from ddfup.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "pyramid_tiny.safetensors"
    models.save_weights(path, tiny_pyramid(), architecture="pyramid", name="tiny", description="")
    return path


def scene(low, high, seed=0):
    """Slanted walls with a box before them, in metres, and a guide with the same edges."""
    rng = np.random.default_rng(seed)

    def depth(size):
        y, x = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]), indexing="ij")
        return (2 + y + 0.5 * x - 0.8 * ((abs(x - 0.5) < 0.2) & (abs(y - 0.6) < 0.3))).astype(np.float32)

    guide = np.repeat(depth(high)[:, :, None], 3, axis=2) * 60 + rng.normal(0, 3, (*high, 3))
    return depth(low), guide.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("model", ["base", "small", "ddfupnet-x8"])
@pytest.mark.parametrize(("low", "high"), [((60, 80), (480, 640)), ((31, 45), (241, 355)), ((64, 48), (512, 384))])
def test_the_result_is_that_of_the_cpu(model, low, high):
    if model == "ddfupnet-x8" and high[0] != 8 * low[0]:
        low = tuple(length // 8 for length in high)
        high = tuple(8 * length for length in low)
    depth, guide = scene(low, high)
    depth[3:6, 4:9] = 0
    expected = Upsampler(model, device="cpu")(depth, guide, fill=True)
    upsampler = Upsampler(model, device="cuda")
    result = upsampler(depth, guide, fill=True)
    assert upsampler.device == "cuda:0" and upsampler.kernels in ("native", "torch")
    np.testing.assert_allclose(result, expected, atol=1e-4 * np.ptp(depth[depth > 0]))


def test_guides_of_every_type_mean_the_same():
    upsampler = Upsampler("base", device="cuda")
    depth, guide = scene((12, 16), (96, 128))
    expected = upsampler(depth, guide)
    unit = guide.astype(np.float64) / 255
    for other in (guide.astype(np.uint16) * 257, unit, unit.astype(np.float32), torch.from_numpy(guide).cuda()):
        np.testing.assert_allclose(upsampler(depth, other), expected, atol=1e-5)
    # The brightest values of 16 bits are negative numbers to what carries them.
    bright = np.full_like(guide, 60000, np.uint16)
    on_cpu = Upsampler("base", device="cpu")(depth, bright)
    np.testing.assert_allclose(upsampler(depth, bright), on_cpu, atol=1e-4 * np.ptp(depth))


@pytest.mark.parametrize("tile", ["none", 256])
def test_tensors_stay_on_the_gpu(weights, monkeypatch, tile):
    upsampler = Upsampler(weights, device="cuda", tile=tile)
    depth, guide = scene((50, 75), (400, 601))
    depth[3:6, 4:9] = 0
    expected = upsampler(depth, guide)
    given, picture = torch.from_numpy(depth).cuda(), torch.from_numpy(guide).cuda()

    def refuse(tensor):
        raise AssertionError("a tensor left the GPU")

    monkeypatch.setattr(torch.Tensor, "cpu", refuse)
    monkeypatch.setattr(torch.Tensor, "numpy", refuse)
    result = upsampler(given, picture)
    monkeypatch.undo()
    assert result.device == given.device
    np.testing.assert_allclose(result.cpu().numpy(), expected, atol=1e-4 * np.ptp(depth))


@pytest.mark.parametrize(("low", "high"), [((100, 75), (801, 601)), ((30, 24), (960, 768)), ((150, 200), (450, 600))])
def test_tiles_give_the_whole(low, high):
    depth, guide = scene(low, high)
    whole = Upsampler("base", device="cuda", tile="none")(depth, guide)
    tiled = Upsampler("base", device="cuda", tile=256)(depth, guide)
    np.testing.assert_allclose(tiled, whole, atol=1e-4 * np.ptp(depth))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_recorded_calls_give_the_same(weights, precision):
    upsampler = Upsampler(weights, device="cuda", precision=precision)
    pairs = [scene((24, 32), (192, 256), seed) for seed in range(4)]
    for index, (depth, _) in enumerate(pairs):
        depth *= 1 + index
        depth[index : index + 3, 4:9] = 0
    results = [upsampler(depth, guide) for depth, guide in pairs]
    assert [type(call) for call in upsampler._recorder._calls.values()] == [Graph]
    for (depth, guide), result in zip(pairs, results, strict=True):
        expected = Upsampler(weights, device="cuda", precision=precision)(depth, guide)
        np.testing.assert_allclose(result, expected, atol=1e-5 * np.ptp(depth))


def test_recordings_outlive_others(weights):
    """The memory of one that is dropped is not that of one that is kept."""
    upsampler, sizes = Upsampler(weights, device="cuda"), ((24, 32), (16, 24), (20, 20))
    pairs = [scene(low, tuple(8 * length for length in low), seed) for seed, low in enumerate(sizes)]
    expected = [upsampler(*pair) for pair in pairs]
    for index in (0, 0, 1, 1, 2, 2, 1, 2, 0, 0, 2):
        torch.cuda.empty_cache()
        np.testing.assert_allclose(upsampler(*pairs[index]), expected[index], atol=1e-5 * np.ptp(pairs[index][0]))
    assert upsampler.release() and not upsampler.release()


def test_threads_and_upsamplers_record_beside_each_other(weights):
    upsamplers = [Upsampler(weights, device="cuda") for _ in range(2)]
    pairs = [scene((24, 32), (192, 256), seed) for seed in range(8)]
    expected = [Upsampler(weights, device="cuda")(*pair) for pair in pairs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda index: upsamplers[index % 2](*pairs[index // 2 % 8]), range(64)))
    for index, result in enumerate(results):
        pair = index // 2 % 8
        np.testing.assert_allclose(result, expected[pair], atol=1e-5 * np.ptp(pairs[pair][0]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_every_gpu_records_its_own(weights):
    upsamplers = [Upsampler(weights, device=f"cuda:{index}") for index in (1, 0, 1)]
    pairs = [scene((24, 32), (192, 256), seed) for seed in range(4)]
    for depth, guide in pairs:
        first, second, third = (upsampler(depth, guide) for upsampler in upsamplers)
        np.testing.assert_allclose(first, second, atol=1e-5 * np.ptp(depth))
        np.testing.assert_array_equal(first, third)
    assert torch.cuda.current_device() == 0


def test_what_waits_for_the_gpu_is_not_recorded(monkeypatch):
    monkeypatch.setattr(graphs, "_refused", threading.Event())
    recorder, stream = Recorder(lambda image: image * image.max().item()), torch.cuda.current_stream()
    for seed in range(4):
        image = torch.rand(64, 64, generator=torch.Generator().manual_seed(seed)).cuda()
        torch.testing.assert_close(recorder(image), image * image.max())
        assert torch.cuda.current_stream() == stream
        torch.cuda.empty_cache()
    assert graphs._refused.is_set()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_nearly_as_accurate(precision):
    depth, guide = scene((60, 80), (480, 640))
    truth = scene((480, 640), (480, 640))[0]
    full = rmse(Upsampler("base", device="cuda")(depth, guide), truth)
    half = rmse(Upsampler("base", device="cuda", precision=precision)(depth, guide), truth)
    assert half < 1.05 * full + 0.001


def test_too_little_memory_means_smaller_tiles():
    depth, guide = scene((150, 200), (2400, 3200))
    upsampler = Upsampler("base", device="cuda", tile="none")
    torch.cuda.reset_peak_memory_stats()
    expected = upsampler(depth, guide)
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
    upsampler, parts = Upsampler("base", device="cuda"), []
    region = upsampler._network.region
    upsampler._network.region = lambda *arguments: parts.append(1) or region(*arguments)
    try:
        result = upsampler(depth, guide)
        assert len(parts) > 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    np.testing.assert_allclose(result, expected, atol=1e-4 * np.ptp(depth))


def test_commands(tmp_path, weights, capfd):
    depth, guide = scene((24, 32), (192, 256))
    for name in ("one", "two"):
        for folder, picture in (("depth", (1000 * depth).astype(np.uint16)), ("rgb", guide)):
            (tmp_path / folder).mkdir(exist_ok=True)
            assert cv2.imwrite(str(tmp_path / folder / f"{name}.png"), picture)
    common = ["--model", str(weights), "--device", "cuda"]
    single = [
        "upsample",
        str(tmp_path / "depth/one.png"),
        str(tmp_path / "rgb/one.png"),
        "-o",
        str(tmp_path / "one.png"),
    ]
    assert cli.main([*single, *common]) == 0, capfd.readouterr().err
    folders = ["batch", str(tmp_path / "depth"), str(tmp_path / "rgb"), str(tmp_path / "out")]
    assert cli.main([*folders, *common]) == 0, capfd.readouterr().err
    alone = cv2.imread(str(tmp_path / "one.png"), cv2.IMREAD_UNCHANGED)
    assert alone.dtype == np.uint16 and alone.shape == (192, 256)
    found = sorted((tmp_path / "out").rglob("*.png"))
    together = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in found]
    assert any(picture is not None and np.array_equal(picture, alone) for picture in together)


@pytest.fixture
def configuration(tmp_path):
    for index in range(3):
        depth, guide = scene((72, 96), (72, 96), seed=index)
        for folder, picture in (("depth", (1000 * depth).astype(np.uint16)), ("rgb", guide)):
            (tmp_path / "set" / folder).mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(tmp_path / "set" / folder / f"{index}.png"), picture)
    sets = (DataSet("set"),)
    return TrainingConfig(
        ModelSection("pyramid", "tiny", config=vars(tiny_pyramid().config)),
        DataSection(sets, sets, tune_frames=1, ratios={"4": 1, "any": 1}, crops={"32": 64}, pixels=8192),
        OptimizationSection(steps=6, warmup=2, precision="bf16", tune_every=6),
    )


def test_training_goes_on_where_it_stopped(tmp_path, configuration):
    config = configuration
    whole = Trainer(config, tmp_path, tmp_path / "whole", device="cuda", workers=0)
    assert whole.run()
    part = Trainer(config, tmp_path, tmp_path / "part", device="cuda", workers=0)
    part.run(on_step=lambda progress: part.stop() if progress.step == 3 else None)
    assert part.step == 3
    rest = Trainer(config, tmp_path, tmp_path / "part", device="cuda", workers=0, resume=True)
    assert rest.run() and rest.tune.keys() == whole.tune.keys()
    # Sums on a GPU are not always made in the same order.
    for a, b in zip(rest.averaged.parameters(), whole.averaged.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_recorded_steps_train_alike(tmp_path, configuration, workers):
    config = dataclasses.replace(configuration, optimization=dataclasses.replace(configuration.optimization, steps=20))
    recorded = Trainer(config, tmp_path, tmp_path / "recorded", device="cuda", workers=workers)
    assert recorded.run()
    assert recorded._recorded._recorded and recorded._recorded._possible
    plain = Trainer(config, tmp_path, tmp_path / "plain", device="cuda", workers=0)
    plain._recorded = None
    assert plain.run()
    assert recorded.loss == pytest.approx(plain.loss, rel=1e-2)
    for a, b in zip(recorded.averaged.parameters(), plain.averaged.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=5e-4)
