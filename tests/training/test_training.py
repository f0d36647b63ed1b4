"""Training on a tiny data set: configuration, samples, exact resumption, learning, files."""

import collections
import dataclasses
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from sets import CONFIG, write_data
from torch.utils._python_dispatch import TorchDispatchMode

import ddfup
from ddfup import models
from ddfup.configs import bundled_configs
from ddfup.errors import ArgumentError, InputError, OutputError, PairingError, WeightsError
from ddfup.training import data as training_data
from ddfup.training import trainer as trainer_module
from ddfup.training.config import DataSet, load_config
from ddfup.training.data import Frame, StepBatches, detail_of, load_frames
from ddfup.training.loading import load_batches
from ddfup.training.optimization import learning_rate, loss_function, squared_weight, take_step
from ddfup.training.trainer import Trainer
from ddfup.training.tuning import tuning_error, tuning_pairs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(tmp_path):
    def make(*changes):
        text = CONFIG
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "config.toml"
        path.write_text(text, "utf-8")
        return load_config(str(path))

    return make


# --- configuration ---


@pytest.mark.parametrize("name", bundled_configs())
def test_bundled_configurations_build_their_networks(name):
    settings = load_config(name)
    network = models.build(settings.model.architecture, settings.model.config)
    assert sum(parameter.numel() for parameter in network.parameters()) > 1e5
    assert settings.data.train and settings.data.tune
    # Frames that are watched are not learned from.
    for tune in settings.data.tune:
        for train in settings.data.train:
            if train.path == tune.path:
                assert train.last is not None and train.last < tune.first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[model]", "[model"), "not a TOML file"),
        (("[optimization]", "[optimisation]"), r"section \[optimization\] is missing"),
        (("warmup", "warm_up"), r"\[optimization\]: unknown key 'warm_up'"),
        (("border", "edge"), r"\[\[data.tune\]\]: unknown key 'edge'"),
        (("steps = 6\n", ""), "steps"),
        (("steps = 6\n", "steps = 6.5\n"), "steps must be of type int; got 6.5"),
        (("steps = 6\n", "steps = true\n"), "steps must be of type int; got True"),
        (("steps = 6\n", "steps = 0\n"), "steps must be above 0; got 0"),
        (("steps = 6\n", "steps = 6\nema = 1.0\n"), r"ema must be in \[0, 1\); got 1.0"),
        (("pixels = 2048", "candidates = 0"), "candidates must be at least 1; got 0"),
        (("disparity = 0.25", "disparity = 1.5"), r"disparity must be a share in \[0, 1\]; got 1.5"),
        (("steps = 6\n", "steps = 6\nseed = -1\n"), "seed must be at least 0; got -1"),
        (
            ("learning_rate = 2e-3", 'learning_rate = "fast"'),
            "learning_rate must be of type float; got 'fast'",
        ),
        (("learning_rate = 2e-3", "learning_rate = nan"), "learning_rate must be of type float; got nan"),
        (("learning_rate = 2e-3", "learning_rate = -1"), "learning_rate must be above 0; got -1"),
        (("tune_every = 4", 'precision = "fp8"'), "precision must be 'fp32' or 'bf16'; got 'fp8'"),
        (("nearest = 0.3", "blur = 0.3"), "degradations must be of nearest, .*; got 'blur'"),
        (("bicubic = 0.5, nearest = 0.3, sensor = 0.2", "bicubic = 0"), "degradations must be shares"),
        (("bicubic = 0.5", "bicubic = -0.5"), "degradations must be shares"),
        (("any = 0.2", "all = 0.2"), "ratios must be 'any' or numbers of at least 1; got 'all'"),
        (("any = 0.2", "0 = 0.2"), "ratios must be .*; got '0'"),
        (("any = 0.2", "any = '1'"), "ratios must be of type"),
        (("crops = { 4 = 16, 32 = 32 }", "crops = {}"), "crops must name at least one side"),
        (("4 = 16", "4 = 1"), "crops must give a side of at least 2 pixels"),
        (("[[data.train]]\n", "[data.train]\n"), r"must be written as \[\[data.train\]\] tables"),
        (
            ('[[data.train]]\npath = "room"', '[[data.train]]\npath = "room"\nweight = 0'),
            "weights of .* shares",
        ),
    ],
)
def test_wrong_configurations_are_refused(config, tmp_path, change, message):
    with pytest.raises((InputError, ArgumentError), match=message) as caught:
        config(change)
    assert str(tmp_path / "config.toml") in caught.value.message


def test_a_missing_configuration_lists_the_bundled_ones(tmp_path):
    with pytest.raises(InputError, match=r"none.toml: cannot read .* \(No such file") as caught:
        load_config(str(tmp_path / "none.toml"))
    assert "base" in caught.value.hint


def test_a_table_where_a_section_belongs(tmp_path):
    (tmp_path / "c.toml").write_text("model = 3\ndata = 4\noptimization = 5\n")
    with pytest.raises(InputError, match="must be a table; got"):
        load_config(str(tmp_path / "c.toml"))


# --- data ---


def test_frames_are_read_in_order_and_cut(root):
    frames = load_frames(root, DataSet("room", first=1, last=2, border=3))
    assert [frame.depth.shape for frame in frames] == [(62, 78), (62, 78)]
    assert frames[0].guide.shape == (62, 78, 3) and frames[0].guide.dtype == np.uint8
    whole = load_frames(root, DataSet("room"))
    assert len(whole) == 6
    np.testing.assert_array_equal(frames[1].depth, whole[2].depth[3:-3, 3:-3])
    assert 1.4 < whole[0].depth[whole[0].depth > 0].min() < 1.6
    assert (whole[0].depth == 0).any() and np.isfinite(whole[0].depth).all()


def test_wrong_data_are_named(root, tmp_path):
    with pytest.raises(InputError, match="nowhere: no files in depth/"):
        load_frames(root, DataSet("nowhere"))
    with pytest.raises(InputError, match="no frame from 6 to None; there are 6"):
        load_frames(root, DataSet("room", first=6))
    with pytest.raises(InputError, match="border = 34 leaves nothing of"):
        load_frames(root, DataSet("room", border=34))
    write_data(tmp_path, frames=2)
    partner = tmp_path / "room" / "rgb" / "0001.png"
    partner.rename(tmp_path / "room" / "rgb" / "0009.png")
    with pytest.raises(InputError, match="no image with the stem '0001'"):
        load_frames(tmp_path, DataSet("room"))
    partner.write_bytes((tmp_path / "room" / "rgb" / "0000.png").read_bytes()[:100])
    with pytest.raises(InputError, match=r"0001\.png"):
        load_frames(tmp_path, DataSet("room"))


def test_hidden_files_are_no_frames_and_stems_are_unique(tmp_path):
    write_data(tmp_path, frames=2)
    (tmp_path / "room" / "depth" / ".DS_Store").write_bytes(b"of a Mac")
    (tmp_path / "room" / "depth" / "._0000.png").write_bytes(b"of a Mac")
    assert len(load_frames(tmp_path, DataSet("room"))) == 2
    for folder in ("rgb", "depth"):
        second = tmp_path / "room" / folder / "0001.tiff"
        second.write_bytes(b"")
        with pytest.raises(PairingError, match=r"0001\.tiff: stems must be unique; 0001\.png has the same"):
            load_frames(tmp_path, DataSet("room"))
        second.unlink()


def batches(root, settings, **options):
    sets = [(load_frames(root, s), s.weight) for s in settings.data.train]
    return StepBatches(sets, settings.data, **{"seed": settings.optimization.seed, **options})


def test_sides_of_free_ratios_are_few_and_fit():
    sides = {side: training_data._of_few(side, most=side) for side in range(2, 513)}
    assert all(few <= side and few >= side / 1.125 for side, few in sides.items())
    assert len({training_data._of_few(side, most=512) for side in sides}) < 60


def test_free_ratios_leave_the_crops_their_sides(root, config):
    """cuDNN plans anew for every size of the guide; named ratios are exact instead."""
    free = batches(root, config(("ratios = { 2 = 0.5, 4 = 0.3, any = 0.2 }", "ratios = { any = 1 }")))
    made = [free[step] for step in range(30)]
    assert {batch.guide.shape[-1] for batch in made} == {16, 32}
    assert len({batch.ratio for batch in made}) > 8
    named = batches(root, config(("ratios = { 2 = 0.5, 4 = 0.3, any = 0.2 }", "ratios = { 3 = 1 }")))
    assert named[0].ratio == 3


def same(first, second):
    return first.ratio == second.ratio and all(
        torch.equal(value, getattr(second, name))
        for name, value in vars(first).items()
        if isinstance(value, torch.Tensor)
    )


def test_a_batch_depends_on_its_number_only(root, config):
    settings = config()
    one, other = batches(root, settings), batches(root, settings)
    forwards = [one[step] for step in range(8)]
    for step in reversed(range(8)):
        assert same(other[step], forwards[step]), step
    assert not any(same(forwards[0], batch) for batch in forwards[1:])
    assert not same(batches(root, settings, seed=1)[3], forwards[3])
    # Processes draw different samples at one common ratio.
    second = batches(root, settings, rank=1, world=2)
    assert all(second[step].ratio == forwards[step].ratio for step in range(8))
    assert not any(same(second[step], forwards[step]) for step in range(8))


def test_batches_are_what_they_promise(root, config):
    ratios = set()
    for step in range(40):
        batch = batches(root, config())[step]
        n, _, h, w = batch.depth.shape
        height, width = batch.target.shape[2:]
        assert batch.guide.shape == (n, 3, height, width) and batch.target.shape == (n, 1, height, width)
        assert height / h == width / w == batch.ratio >= 1
        assert n == 1 or n * height * width == pytest.approx(2048, rel=0.3)
        assert 0 <= batch.guide.min() and batch.guide.max() <= 1
        for i in range(n):
            low, high = batch.depth[i], batch.target[i]
            assert (low > 0).any() and (high > 0).float().mean() > 0.5
            # Low resolution of this very target; sensors add noise, antialiasing rings a little.
            assert 0.8 * high[high > 0].min() < low[low > 0].mean() < 1.2 * high.max()
        assert batch.std.shape == batch.weight.shape == (n, 1, 1, 1)
        assert (batch.std > 0).all() and (batch.weight > 0).all()
        ratios.add(round(batch.ratio, 2))
    assert {2, 4} < ratios and len(ratios) > 4


def test_at_ratios_near_one_there_is_noise_to_remove(root, config):
    settings = config(
        ("ratios = { 2 = 0.5, 4 = 0.3, any = 0.2 }", "ratios = { 1 = 1 }"),
        ("{ bicubic = 0.5, nearest = 0.3, sensor = 0.2 }", "{ bicubic = 1 }"),
    )
    batch = batches(root, settings)[0]
    both = (batch.depth > 0) & (batch.target > 0)
    assert batch.ratio == 1 and (batch.depth != batch.target)[both].any()


def test_images_smaller_than_a_crop_are_refused(root, config):
    with pytest.raises(InputError, match="crop of 128 pixels does not fit a training image of 84 x 68"):
        batches(root, config(("4 = 16, 32 = 32", "32 = 128")))[0]


def test_data_without_depth_do_not_hang(config):
    frame = Frame(np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.float32))
    with pytest.raises(InputError, match="none had depth in more than half"):
        StepBatches([([frame], 1.0)], config().data, seed=0)[0]


def test_detail_is_the_error_of_coarse_interpolation():
    depth = np.full((64, 128), 2.0, np.float32)
    depth[:, 90:] = 4.0
    depth[:20, :20] = 0
    table = detail_of(depth)
    assert table.shape == (9, 17)
    cells = np.diff(np.diff(table, axis=0), axis=1)
    # Only the step is detail: neither flat walls nor the rim of a hole are.
    assert (cells[:, 10:13].sum(axis=1) > 0.3).all()
    np.testing.assert_allclose(cells[:, :9], 0, atol=1e-5)
    np.testing.assert_allclose(cells[:, 14:], 0, atol=1e-5)
    # In deviations of the depth: the unit of length cancels.
    np.testing.assert_allclose(detail_of(1000 * depth), table, rtol=1e-4, atol=1e-5)
    assert not detail_of(np.zeros((5, 9), np.float32)).any()


def test_detailed_crops_are_drawn_more_often_and_weigh_less(config):
    depth = np.full((64, 128), 2.0, np.float32)
    depth[:, 64::4] = 4.0
    frames = [([Frame(np.zeros((64, 128, 3), np.uint8), depth)], 1.0)]
    settings = ("pixels = 2048", "pixels = 1024\ncandidates = 4"), ("2 = 0.5, 4 = 0.3, any = 0.2", "4 = 1.0")
    data = config(*settings, ("disparity = 0.25", "disparity = 0.0")).data
    rough, weights = [], []
    for step in range(400):
        batch = StepBatches(frames, data, seed=3)[step]
        rough += [float(target.std() > 0.1) for target in batch.target]
        weights += batch.weight.flatten().tolist()
    rough, weights = np.array(rough), np.array(weights)
    # Without choice, a bit more than half of the windows show some of the rough half.
    plain = StepBatches(frames, dataclasses.replace(data, candidates=1), seed=3)
    batches = [plain[step] for step in range(400)]
    share = np.mean([float(target.std() > 0.1) for batch in batches for target in batch.target])
    assert all((batch.weight == 1).all() for batch in batches)
    assert rough.mean() > share + 0.2
    assert weights[rough == 1].mean() < 1 < weights[rough == 0].mean()
    # Weighted, the share is what it was: the goal of learning is the same.
    assert (rough * weights).mean() == pytest.approx(share, abs=0.05)
    assert weights.mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("inverse", [False, True])
def test_shrunk_depth_is_the_mean_of_what_is_measured(inverse):
    """Area means over blocks, by numpy; of disparity, the mean of disparities."""
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 4, (64, 64)).astype(np.float32)
    depth[:16, :24] = 0  # wholly a hole
    depth[33, ::2] = 0  # a quarter of each block
    depth[40:42, 40:50] = 0
    depth[40, 40:50] = 2  # a half
    depth[50:52, 40:50] = 0
    depth[50, 40:50:2] = 2  # three quarters
    frame = Frame(np.zeros((64, 64, 3), np.uint8), depth)
    _, cut = training_data._cut(frame, training_data._Window(0, 0, 64), 32, rng, inverse=inverse)
    wanted = np.where(depth > 0, 1 / np.maximum(depth, 1e-3) if inverse else depth, np.nan).astype(np.float64)
    blocks = wanted.reshape(32, 2, 32, 2).transpose(0, 2, 1, 3).reshape(32, 32, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.nan_to_num(np.nanmean(blocks, axis=-1))
    expected[np.isfinite(blocks).sum(axis=-1) < 2] = 0
    assert (expected == 0).sum() == 8 * 12 + 5
    turned = [np.rot90(flip, k) for flip in (cut, cut[:, ::-1]) for k in range(4)]
    assert any(np.allclose(view, expected, rtol=1e-5) for view in turned)


@pytest.mark.parametrize(("frames", "count"), [(10, 3), (3, 10), (7, 7), (5, 1)])
def test_tuning_frames_are_spread(frames, count):
    chosen = tuning_pairs(list(range(frames)), count)
    assert len(chosen) == min(frames, count) and chosen[0] == 0
    assert len(set(np.diff(chosen))) <= 1


# --- schedule and loss ---


def test_the_schedule(config):
    section = config(("steps = 6\n", "steps = 1000\nsquared = 2\nsquared_end = 4\n")).optimization
    rates = [learning_rate(step, section) for step in range(1001)]
    assert rates[0] == pytest.approx(1e-3) and max(rates) == rates[1] == pytest.approx(2e-3)
    assert rates[1000] == pytest.approx(2e-6)
    assert rates[501] == pytest.approx(1e-3, rel=0.01)
    assert all(a >= b for a, b in pairwise(rates[1:]))
    weights = [squared_weight(step, section) for step in (0, 750, 875, 1000)]
    assert weights == [2, 2, 3, 4]


def test_the_loss_counts_measured_pixels_only():
    target = torch.full((1, 1, 4, 4), 2.0)
    target[..., :2] = 0
    prediction = torch.full_like(target, 2.5, requires_grad=True)
    std = torch.full((1, 1, 1, 1), 0.5)
    loss = loss_function(prediction, target, std, 4.0, 1.0)
    loss.backward()
    # By hand: off by one deviation, and Huber 0.5 * (2 * off - 0.5), in hundredths.
    assert loss.item() == pytest.approx(100 * (1 + 0.75))
    assert not prediction.grad[..., :2].any() and (prediction.grad[..., 2:] > 0).all()
    assert loss_function(target.clone(), target, std, 4.0, 1.0) == 0
    # A unit of length cancels; nothing measured costs nothing.
    scaled = loss_function(3 * prediction, 3 * target, 3 * std, 4.0, 1.0)
    assert scaled.item() == pytest.approx(loss.item())
    assert loss_function(prediction, 0 * target, std, 4.0, 1.0) == 0
    weighted = loss_function(prediction, target, std, 4.0, 1.0, torch.full_like(std, 0.25))
    assert weighted.item() == pytest.approx(0.25 * loss.item())
    # Squared as far as the bound, here to just where the error is.
    assert loss_function(prediction, target, std, 4.0, 1.0, huber=1.0).item() == pytest.approx(100 * (1 + 1))


def test_the_tuning_error_of_the_truth_itself_is_none(root):
    frames = load_frames(root, DataSet("room", last=1))

    class Oracle(torch.nn.Module):
        config = object()
        asked = 0

        def forward(self, depth, guide, valid):
            frame = frames[self.asked % 2]
            Oracle.asked += 1
            h, w = guide.shape[2:]
            return torch.from_numpy(frame.depth[:h, :w])[None, None] + 0.01

    errors = tuning_error(Oracle(), frames, torch.device("cpu"))
    assert list(errors) == [f"{kind} x{factor}" for kind in ("bicubic", "nearest") for factor in (4, 8, 16)]
    assert all(value == pytest.approx(1, rel=1e-3) for value in errors.values())


# --- runs ---


def states(run):
    return {
        "network": run.network.state_dict(),
        "averaged": run.averaged.state_dict(),
        "moments": {
            f"{i}.{key}": value
            for i, state in run.optimizer.state_dict()["state"].items()
            for key, value in state.items()
        },
    }


def assert_same_run(first, second):
    assert (first.step, first.loss, first.tune) == (second.step, second.loss, second.tune)
    for part, tensors in states(first).items():
        others = states(second)[part]
        assert tensors.keys() == others.keys()
        for key, value in tensors.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(others[key])), f"{part} {key}"


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """An uninterrupted run of six steps, and what it reported."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "config.toml").write_text(CONFIG)
    run = Trainer(load_config(str(folder / "config.toml")), root, folder / "run", workers=0)
    reports = []
    assert run.run(on_step=reports.append)
    return run, reports


def test_a_run_reports_logs_and_writes_weights(finished):
    run, reports = finished
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert all(report.steps == 6 and math.isfinite(report.loss) for report in reports)
    assert not reports[2].tune and set(reports[3].tune) == set(run.tune)
    assert sorted(path.name for path in run.out.iterdir()) == [
        "checkpoint.pt",
        "log.jsonl",
        "pyramid_tiny.safetensors",
    ]
    records = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 6]
    assert records[-1]["tune"] == run.tune and len(run.tune) == 6
    assert records[-1]["loss"] == pytest.approx(run.loss, abs=1e-4)
    info = models.read_info(run.weights)
    assert (info.name, info.description) == ("tiny", "of the tests")
    loaded = models.load_model(run.weights).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in run.averaged.state_dict().items())


# PyTorch warns of more workers than cores, of which a machine may have one.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(root, config, tmp_path, finished, workers):
    out = tmp_path / "run"

    class Interrupt(Exception):
        pass

    def raise_at_two(progress):
        if progress.step == 2:
            raise Interrupt

    with pytest.raises(Interrupt):
        Trainer(config(), root, out, workers=0).run(on_step=raise_at_two)
    second = Trainer(config(), root, out, resume=True, workers=workers)
    assert second.step == 2
    # An orderly stop, as after a signal, ends after the step under way.
    assert not second.run(on_step=lambda progress: second.stop() if progress.step == 4 else None)
    third = Trainer(config(), root, out, resume=True, workers=workers)
    assert third.step == 4
    assert third.run()
    assert_same_run(third, finished[0])
    assert third.weights.read_bytes() == finished[0].weights.read_bytes()
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [4, 6]


def test_a_signal_for_all_processes_stops_the_run_in_order(root, config, tmp_path):
    """As a cluster sends it: to the loader's processes as well, which it ends at once."""
    run = Trainer(config(("steps = 6\n", "steps = 100000\n")), root, tmp_path / "run", workers=1)

    def everyone(progress):
        if progress.step == 2:
            run.stop()
            for child in multiprocessing.active_children():
                child.terminate()
                child.join()

    assert not run.run(on_step=everyone)
    assert Trainer(run.config, root, tmp_path / "run", resume=True, workers=0).step == 2


def test_a_loader_that_dies_unasked_is_an_error(root, config, tmp_path):
    run = Trainer(config(("steps = 6\n", "steps = 100000\n")), root, tmp_path / "run", workers=1)

    def killed(progress):
        if progress.step == 2:
            for child in multiprocessing.active_children():
                child.kill()

    with pytest.raises((RuntimeError, ConnectionError)):
        run.run(on_step=killed)


# PyTorch warns of more workers than cores, of which a machine may have one.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_data_is_told_as_it_is(root, config, tmp_path, workers):
    settings = config(("4 = 16, 32 = 32", "32 = 128"))
    run = Trainer(settings, root, tmp_path / "run", workers=workers)
    with pytest.raises(InputError) as caught:
        run.run()
    assert caught.value.message == "crop of 128 pixels does not fit a training image of 84 x 68"
    assert caught.value.hint == "lower [data] crops, or leave the set out"


def test_loaders_have_one_thread_each(root, config, monkeypatch):
    """OpenCV would have as many as there are cores in every process."""
    monkeypatch.setattr(StepBatches, "__getitem__", lambda self, step: cv2.getNumThreads())
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(3)
        found = load_batches(batches(root, config()), range(2), workers=1, device=torch.device("cpu"))
        assert list(found) == [1, 1] and cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


def test_a_finished_run_stays_as_it_is(root, config, tmp_path):
    run = Trainer(config(("steps = 6\n", "steps = 1\n")), root, tmp_path / "run", workers=0)
    assert run.run()
    log, weights = (tmp_path / "run" / "log.jsonl").read_text(), run.weights.read_bytes()
    again = Trainer(config(("steps = 6\n", "steps = 1\n")), root, tmp_path / "run", resume=True, workers=0)
    assert again.run()
    assert (tmp_path / "run" / "log.jsonl").read_text() == log
    assert again.weights.read_bytes() == weights


def test_an_exception_within_a_step_keeps_the_last_whole_state(root, config, tmp_path, monkeypatch):
    run = Trainer(config(), root, tmp_path / "run", workers=0)
    run.run(on_step=lambda progress: run.stop())
    before = run.checkpoint.read_bytes()
    again = Trainer(config(), root, tmp_path / "run", resume=True, workers=0)

    def torn(*arguments, **options):
        # The weights have moved, the step is not counted yet.
        raise KeyboardInterrupt

    monkeypatch.setattr(again.optimizer, "step", torn)
    with pytest.raises(KeyboardInterrupt):
        again.run()
    assert again.checkpoint.read_bytes() == before


def test_time_runs_out(root, config, tmp_path):
    run = Trainer(config(), root, tmp_path / "run", workers=0)
    assert not run.run(max_minutes=0)
    assert run.step == 1
    assert Trainer(config(), root, tmp_path / "run", resume=True, workers=0).step == 1


def test_existing_and_missing_runs_are_refused(root, config, tmp_path, finished):
    with pytest.raises(InputError, match="a run is here already") as caught:
        Trainer(config(), root, finished[0].out)
    assert "--resume" in caught.value.hint
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        Trainer(config(), root, tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: cannot be made a folder"):
        Trainer(config(), root, tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps = 6\n", "steps = 6\nseed = 7\n"), "optimization.seed must be 0 as when the run began; got 7"),
        (("steps = 6\n", "steps = 6\nweight_decay = 0.5\n"), "optimization.weight_decay must be 0.0001 .*; got 0.5"),
        (("steps = 6\n", "steps = 9\n"), "optimization.steps must be 6 .*; got 9"),
        (("any = 0.2", "any = 0.3"), "data.ratios.any must be 0.2 .*; got 0.3"),
        (("any = 0.2", "8 = 0.2"), "data.ratios.any must be 0.2 .*; got None"),
        (("last = 3", "last = 2"), r"data.train\[0\].last must be 3 .*; got 2"),
        (("[[data.tune]]", '[[data.train]]\npath = "hall"\n[[data.tune]]'), r"data.train\[1\] must be None .*'hall'"),
        (("[6, 8, 8]", "[6, 8, 9]"), r"model.config.guide_channels\[2\] must be 8 .*; got 9"),
    ],
)
def test_another_configuration_is_refused(root, config, finished, change, message):
    before = finished[0].checkpoint.read_bytes()
    with pytest.raises(InputError, match=rf"checkpoint\.pt: cannot be resumed: {message}") as caught:
        Trainer(config(change), root, finished[0].out, resume=True)
    assert "--out" in caught.value.hint and "--init" in caught.value.hint
    assert finished[0].checkpoint.read_bytes() == before


def test_another_number_of_processes_is_refused(root, config, finished, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="processes must be 1 as when the run began; got 2"):
        Trainer(config(), root, finished[0].out, resume=True)


def resumable(finished, out, change=lambda state: None):
    """A folder with the checkpoint of a finished run, changed."""
    state = torch.load(finished[0].checkpoint, weights_only=True)
    change(state)
    out.mkdir()
    torch.save(state, out / "checkpoint.pt")
    return out


def test_what_does_not_reach_the_weights_may_change(root, config, tmp_path, finished):
    settings = config(
        ("of the tests", "of another day"),
        ("tune_frames = 2", "tune_frames = 1"),
        ("tune_every = 4", "tune_every = 1\ncheckpoint_minutes = 9"),
    )
    assert Trainer(settings, root, resumable(finished, tmp_path / "run"), resume=True).step == 6


def test_checkpoints_of_other_versions_go_on(root, config, tmp_path, finished):
    def without_configuration(state):
        del state["config"], state["processes"]

    old = resumable(finished, tmp_path / "old", without_configuration)
    assert Trainer(config(("steps = 6\n", "steps = 6\nseed = 7\n")), root, old, resume=True).step == 6

    def with_other_options(state):
        del state["config"]["data"]["candidates"]
        state["config"]["data"]["mirror"] = True

    other = resumable(finished, tmp_path / "other", with_other_options)
    assert Trainer(config(), root, other, resume=True).step == 6


def test_a_run_starts_from_given_weights(root, config, tmp_path, finished):
    run = Trainer(config(), root, tmp_path / "run", init=str(finished[0].weights))
    given = finished[0].averaged.state_dict()
    for network in (run.network, run.averaged):
        assert all(torch.equal(value, given[key]) for key, value in network.state_dict().items())
    assert run.step == 0 and not run.optimizer.state_dict()["state"]


def test_unfit_initial_weights_are_refused(root, config, tmp_path, finished):
    weights = str(finished[0].weights)
    with pytest.raises(WeightsError, match=r"sizes must be .*trunk_channels=6.*; got .*trunk_channels=8"):
        Trainer(config(("trunk_channels = 8", "trunk_channels = 6")), root, tmp_path / "run", init=weights)
    with pytest.raises(WeightsError, match="architecture must be 'pyramid'; got 'ddfupnet'"):
        Trainer(config(), root, tmp_path / "run", init="ddfupnet-x4")
    # Before the data are read, which may take minutes.
    with pytest.raises(WeightsError, match="nosuch"):
        Trainer(config(), tmp_path / "no data", tmp_path / "run", init="nosuch")
    with pytest.raises(ArgumentError, match="init must be left out of a resumed run"):
        Trainer(config(), root, finished[0].out, resume=True, init=weights)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other network"])
def test_a_damaged_checkpoint_is_named(root, config, tmp_path, finished, damage):
    out = tmp_path / "run"
    out.mkdir()
    data = finished[0].checkpoint.read_bytes()
    change = {"cut": data[: len(data) // 2], "empty": b"", "text": b"no checkpoint", "other network": data}
    (out / "checkpoint.pt").write_bytes(change[damage])
    settings = config(("trunk_channels = 8", "trunk_channels = 9")) if damage == "other network" else config()
    with pytest.raises(InputError, match=r"checkpoint\.pt: cannot be resumed"):
        Trainer(settings, root, out, resume=True)


def test_a_full_disk_is_an_output_error_and_leaves_no_rest(root, config, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    run = Trainer(config(), root, tmp_path / "run", workers=0)
    monkeypatch.setattr(os, "fsync", full)
    message = r"run/checkpoint\.pt: must be writable \([0-9]+ bytes\); got No space left on device"
    with pytest.raises(OutputError, match=message):
        run.run(max_minutes=0)
    assert not list((tmp_path / "run").iterdir())


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(root, config, tmp_path, monkeypatch):
    run = Trainer(config(), root, tmp_path / "run", workers=0)
    # A file of somebody else.
    (tmp_path / "run" / "checkpoint.tmp").write_text("mine")
    flushed, renamed = [], {}
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(handle):
        fsync(handle)
        flushed.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))

    def watched_replace(path, target):
        renamed[Path(target).name] = path.name, (path.stat().st_ino, path.stat().st_size) in flushed
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    names = set()
    for _ in range(2):
        run.run(max_minutes=0)
        name, was_flushed = renamed["checkpoint.pt"]
        assert was_flushed
        names.add(name)
    assert len(names) == 2
    found = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert found == ["checkpoint.pt", "checkpoint.tmp", "pyramid_tiny.safetensors"]
    assert (tmp_path / "run" / "checkpoint.tmp").read_text() == "mine"


def test_a_configuration_without_data_is_refused(root, config, tmp_path):
    settings = config(('[[data.train]]\npath = "room"\nlast = 3\n', ""))
    with pytest.raises(InputError, match=r"names no \[\[data.train\]\] set"):
        Trainer(settings, root, tmp_path / "run")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_falls_on_a_fixed_problem(root, config, tmp_path, monkeypatch, precision):
    settings = config(
        ("steps = 6\n", f'steps = 60\nema = 0.9\nprecision = "{precision}"\n'),
        ("ratios = { 2 = 0.5, 4 = 0.3, any = 0.2 }", "ratios = { 4 = 1.0 }"),
        ("tune_every = 4", "tune_every = 1000"),
    )
    run = Trainer(settings, root, tmp_path / "run", workers=0)
    fixed = run.batches[0]
    monkeypatch.setattr(StepBatches, "__getitem__", lambda self, step: fixed)
    losses = []

    def watch(*arguments, **options):
        loss = loss_function(*arguments, **options)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(trainer_module, "loss_function", watch)
    assert run.run()
    assert losses[-1] < 0.7 * losses[0], losses
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_with_a_broken_gradient_is_left_out(root, config, tmp_path, monkeypatch, fused):
    run = fused_run(config(), root, tmp_path / "run") if fused else Trainer(config(), root, tmp_path / "run", workers=0)
    before = {key: value.clone() for key, value in run.network.state_dict().items()}

    def broken(prediction, *rest, **options):
        return (prediction * math.nan).sum()

    monkeypatch.setattr(trainer_module, "loss_function", broken)
    run.run(max_minutes=0)
    assert run.step == 1
    assert all(torch.equal(value, before[key]) for key, value in run.network.state_dict().items())


class Reads(TorchDispatchMode):
    """Counts the operations that read a value back, for which the CPU waits for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def found(self):
        return [name for name in self.count if any(s in name for s in ("_local_scalar_dense", "nonzero", "equal"))]


def fused_run(settings, root, out):
    """A run with the optimiser that runs on a GPU have; CPUs know it, too."""
    run = Trainer(settings, root, out, workers=0)
    section = settings.optimization
    run.optimizer = torch.optim.AdamW(
        run.network.parameters(), lr=section.learning_rate, weight_decay=section.weight_decay, fused=True
    )
    return run


def test_no_step_on_a_gpu_waits_for_the_one_before(root, config, tmp_path):
    run = fused_run(config(), root, tmp_path / "run")

    def network(depth, guide, valid):
        # That those of ours do not wait is for tests/models/test_waiting.py; on a CPU they may.
        return guide[:, :1] + sum(parameter.mean() for parameter in run.network.parameters())

    run.parallel = network
    with Reads() as reads:
        for step in range(2):
            run._train_step(run.batches[step])
    assert reads.count["aten._fused_adamw_.default"] == 2
    assert reads.found == []
    with Reads() as reads:
        assert math.isfinite(run.loss)
    assert reads.found == ["aten._local_scalar_dense.default"]


def test_both_optimisers_step_alike_and_leave_broken_steps_out():
    results = []
    for fused in (None, True):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
        # The first one, too, when the optimiser has no state yet.
        for broken in (math.nan, 0.5, math.inf, 4.0):
            weight.grad = torch.tensor([1.0, broken, 3.0])
            before = weight.detach().clone()
            take_step(optimizer, weight.grad.norm())
            assert torch.equal(weight, before) != math.isfinite(broken)
        assert optimizer.state[weight]["step"] == 2
        results.append([weight.detach(), *(optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq"))])
    torch.testing.assert_close(results[0], results[1])


def test_a_run_of_a_gpu_goes_on_without_one(root, config, tmp_path):
    fused_run(config(), root, tmp_path / "run").run(max_minutes=0)
    run = Trainer(config(), root, tmp_path / "run", resume=True, workers=0)
    assert [group["fused"] for group in run.optimizer.param_groups] == [None]
    assert run.run()


def test_the_loss_that_is_told_is_the_running_mean(root, config, tmp_path, monkeypatch):
    run = Trainer(config(), root, tmp_path / "run", workers=0)
    values, reports = [], []

    def watch(*arguments, **options):
        # One step is broken.
        loss = loss_function(*arguments, **options) * (math.nan if len(values) == 3 else 1)
        values.append(loss.item())
        return loss

    monkeypatch.setattr(trainer_module, "loss_function", watch)
    assert math.isnan(run.loss) and run.run(on_step=reports.append)
    mean, expected = math.nan, []
    for value in values:
        if math.isfinite(value):
            mean = value if math.isnan(mean) else 0.99 * mean + 0.01 * value
        expected.append(mean)
    assert [report.loss for report in reports] == expected
    assert run.loss == expected[-1] and len(set(expected)) == 5


@pytest.fixture
def groups(monkeypatch):
    """Stand-ins for PyTorch's process groups, and what is asked of them."""
    state = {"made": 0, "destroyed": 0, "there": False}

    def change(there, count):
        state["there"] = there
        state[count] += 1

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(trainer_module, "is_initialized", lambda: state["there"])
    monkeypatch.setattr(trainer_module, "init_process_group", lambda backend: change(True, "made"))
    monkeypatch.setattr(trainer_module, "destroy_process_group", lambda: change(False, "destroyed"))
    monkeypatch.setattr(trainer_module, "all_reduce", lambda flag, operation: None)
    monkeypatch.setattr(trainer_module, "DistributedDataParallel", lambda network, **options: network)
    return state


def test_a_group_that_was_there_stays(root, config, tmp_path, groups):
    groups["there"] = True
    with Trainer(config(), root, tmp_path / "run", workers=0) as run:
        run.run(max_minutes=0)
    assert groups == {"made": 0, "destroyed": 0, "there": True}


def test_a_group_of_its_own_lasts_for_all_runs(root, config, tmp_path, groups):
    with Trainer(config(), root, tmp_path / "run", workers=0) as run:
        for step in (1, 2):
            run.run(max_minutes=0)
            assert run.step == step
            assert groups == {"made": 1, "destroyed": 0, "there": True}
    run.close()
    assert groups == {"made": 1, "destroyed": 1, "there": False}
    # Nobody closed this one.
    Trainer(config(), root, tmp_path / "other", workers=0)
    assert groups == {"made": 2, "destroyed": 2, "there": False}


@pytest.mark.parametrize("what", ["load_frames", "DistributedDataParallel"])
def test_no_group_is_left_behind_by_a_failure(root, config, tmp_path, groups, monkeypatch, what):
    def failing(*arguments, **options):
        raise InputError("no")

    monkeypatch.setattr(trainer_module, what, failing)
    with pytest.raises(InputError, match="no") as caught:
        Trainer(config(), root, tmp_path / "run", workers=0)
    # The traceback keeps the trainer.
    assert caught.tb and not groups["there"] and groups["made"] == groups["destroyed"]


def test_two_processes_train_one_network_and_stop_together(root, config, tmp_path):
    config(("tune_every = 4", "tune_every = 100"))
    code = (
        "import sys, torch; torch.set_num_threads(1); from pathlib import Path;"
        "from ddfup.training.config import load_config; from ddfup.training.trainer import Trainer;"
        "config, root, out = sys.argv[1:];"
        "run = Trainer(load_config(config), Path(root), Path(out), device='cpu', workers=0);"
        # One of the two wants to stop: both do, rather than wait for each other.
        "done = run.run(on_step=lambda p: run.stop() if (run.rank, p.step) == (1, 2) else None);"
        # And they go on together.
        "assert (run.step, done) == (2, False); done = run.run();"
        "print(run.step, done, float(sum(p.double().abs().sum() for p in run.network.parameters())))"
    )
    arguments = [str(tmp_path / "config.toml"), str(root), str(tmp_path / "run")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(Path(ddfup.__file__).parents[1]), "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    # The last line: some versions of PyTorch tell of the connection in others.
    first, second = (out.splitlines()[-1].split() for out, _ in results)
    assert first == second and first[:2] == ["6", "True"]
    models.load_model(tmp_path / "run" / "pyramid_tiny.safetensors")
