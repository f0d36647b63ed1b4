"""Teachers' part in the targets: whom they are asked about, how, and what is mixed."""

import numpy as np
import pytest
import torch
from sets import CONFIG, write_data

from ddfup import models
from ddfup.degrade import degrade
from ddfup.errors import ArgumentError, InputError, WeightsError
from ddfup.training.config import DataSection, load_config
from ddfup.training.data import Batch, Frame, StepBatches
from ddfup.training.distillation import Distillation
from ddfup.training.trainer import Trainer

SECTION = '\n[distillation]\nteachers = ["small"]\ntruth = 0.25\n'


def make_batch(symmetric=(True, True, False), side=16, ratio=4):
    generator = torch.Generator().manual_seed(3)
    count = len(symmetric)
    target = 1 + torch.rand(count, 1, side, side, generator=generator)
    target[:, :, :3, :5] = 0
    depth = target[:, :, ratio // 2 :: ratio, ratio // 2 :: ratio].clone()
    guide = torch.rand(count, 3, side, side, generator=generator)
    ones = torch.ones(count, 1, 1, 1)
    return Batch(depth, guide, target, ones, ones, float(ratio), tuple(symmetric))


def nearest(depth, guide, valid):
    """A teacher that a turned sample tells nothing else."""
    scale = guide.shape[-1] // depth.shape[-1]
    return depth.repeat_interleave(scale, -1).repeat_interleave(scale, -2)


def test_views_are_undone_exactly():
    """A teacher that gives the guide back, whatever it is shown, has said the guide."""
    batch = make_batch()
    distillation = Distillation([lambda depth, guide, valid: 0.5 + guide[:, :1]], truth=0, seed=1)
    known = batch.target > 0
    for step in range(20):
        target = distillation(batch, step).target
        torch.testing.assert_close(target[known], (0.5 + batch.guide[:, :1])[known])


@pytest.mark.parametrize("truth", [0.0, 0.3, 1.0])
def test_truth_has_its_share_and_holes_stay(truth):
    batch = make_batch()
    mixed = Distillation([nearest], truth=truth, seed=1)(batch, 7)
    said = nearest(batch.depth, batch.guide, None)
    # Where the teacher says 0, the truth stands alone.
    expected = torch.where(said > 0, truth * batch.target + (1 - truth) * said, batch.target)
    torch.testing.assert_close(mixed.target, torch.where(batch.target > 0, expected, 0))
    for name in ("depth", "guide", "std", "weight", "ratio", "symmetric"):
        assert getattr(mixed, name) is getattr(batch, name)


def test_what_is_no_depth_is_not_mixed():
    batch = make_batch()

    def broken(depth, guide, valid):
        answer = nearest(depth, guide, valid)
        answer[:, :, ::2] = torch.nan
        answer[:, :, 1::2] = -1
        return answer

    torch.testing.assert_close(Distillation([broken], truth=0.5, seed=1)(batch, 0).target, batch.target)


def test_every_view_is_asked_about_and_of_single_pixels_only_transpositions():
    batch, seen = make_batch((True, False)), [set(), set()]

    def watching(depth, guide, valid):
        assert torch.equal(valid, depth > 0)
        for views, image in zip(seen, guide, strict=True):
            views.add(tuple(image[0].flatten().tolist()))
        return nearest(depth, guide, valid)

    distillation = Distillation([watching], truth=0.5, seed=1)
    for step in range(100):
        distillation(batch, step)
    image = batch.guide[1, 0]
    assert len(seen[0]) == 8
    assert seen[1] == {tuple(view.flatten().tolist()) for view in (image, image.T)}


def test_a_step_asks_the_same_again_and_every_teacher_is_asked():
    batch, asked = make_batch(), []

    def teacher(name):
        def answer(depth, guide, valid):
            asked.append((name, guide.clone()))
            return nearest(depth, guide, valid)

        return answer

    distillation = Distillation([teacher("a"), teacher("b")], truth=0.5, seed=1)
    for step in (*range(12), 5):
        distillation(batch, step)
    assert {name for name, _ in asked} == {"a", "b"}
    assert asked[-1][0] == asked[5][0] and torch.equal(asked[-1][1], asked[5][1])
    other = Distillation([teacher("a"), teacher("b")], truth=0.5, seed=1, rank=1)
    for step in range(12):
        other(batch, step)
    pairs = zip(asked[:12], asked[13:], strict=True)
    assert any(mine[0] != others[0] or not torch.equal(mine[1], others[1]) for mine, others in pairs)


def sampled(kind, **options):
    y, x = np.mgrid[:96, :96]
    frame = Frame(np.zeros((96, 96, 3), np.uint8), (2 + (x > 40) + 0.01 * y).astype(np.float32))
    section = DataSection((), (), degradations={kind: 1.0}, ratios={"4": 1.0}, crops={"4": 32}, pixels=4096, **options)
    return StepBatches([([frame], 1.0)], section, seed=0)


@pytest.mark.parametrize("kind", ["bicubic", "bilinear", "area", "nearest", "sensor"])
def test_batches_tell_which_samples_may_be_mirrored(kind):
    batch = sampled(kind)[0]
    assert batch.symmetric == (kind not in ("nearest", "sensor"),) * 4
    # By their own measure: the low resolution of mirrored truth.
    if kind in ("bicubic", "nearest"):
        truth, low = (tensor[0, 0].numpy() for tensor in (batch.target, batch.depth))
        mirrored = degrade(truth[:, ::-1], 4, kind)[:, ::-1]
        assert np.allclose(mirrored, low, atol=1e-4) == (kind == "bicubic")


def test_slopes_are_added_to_depth_and_its_low_resolution():
    plain, sloped = (sampled("area", slopes=share)[0] for share in (0.0, 1.0))
    assert torch.equal(plain.std, sloped.std)
    assert (sloped.target > 0).all()
    means = torch.nn.functional.avg_pool2d(sloped.target, 4)
    torch.testing.assert_close(sloped.depth, means, rtol=1e-4, atol=1e-4)
    for step in range(10):
        batch = sampled("area", slopes=1.0)[step]
        # Second differences of a plane are 0: within both halves of the frame only the plane was added.
        for image, std in zip(batch.target[:, 0].double(), batch.std.flatten(), strict=True):
            bends = (image[:, 2:] - 2 * image[:, 1:-1] + image[:, :-2]).abs()
            assert (bends.amax(dim=0) > 0.1).sum() <= 2
            rise = image.amax() - image.amin()
            assert rise > 0.3 * std


def test_training_with_teachers_goes_on_where_it_stopped(tmp_path):
    root = write_data(tmp_path / "data")
    path = tmp_path / "config.toml"
    path.write_text(CONFIG + SECTION, "utf-8")
    config = load_config(str(path))
    assert config.distillation.teachers == ("small",) and config.distillation.truth == 0.25
    whole = Trainer(config, root, tmp_path / "whole", workers=0)
    assert whole.run()
    part = Trainer(config, root, tmp_path / "part", workers=0)
    part.run(on_step=lambda progress: part.stop() if progress.step == 3 else None)
    rest = Trainer(config, root, tmp_path / "part", workers=0, resume=True)
    assert rest.step == 3 and rest.run()
    for a, b in zip(rest.averaged.parameters(), whole.averaged.parameters(), strict=True):
        assert torch.equal(a, b)
    path.write_text(CONFIG, "utf-8")
    alone = Trainer(load_config(str(path)), root, tmp_path / "alone", workers=0)
    assert alone.run() and alone.loss != whole.loss


def test_a_teacher_may_be_a_file_and_must_be_sound(tmp_path):
    path = tmp_path / "config.toml"
    weights = models.find_model("small").path.read_bytes()
    (tmp_path / "mine.safetensors").write_bytes(weights)
    path.write_text(CONFIG + SECTION.replace("small", str(tmp_path / "mine.safetensors")), "utf-8")
    root = write_data(tmp_path / "data")
    assert Trainer(load_config(str(path)), root, tmp_path / "run", workers=0).distillation is not None
    (tmp_path / "mine.safetensors").write_bytes(weights[:-100])
    with pytest.raises(WeightsError, match=r"mine\.safetensors"):
        Trainer(load_config(str(path)), root, tmp_path / "other", workers=0)


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ('["small"]', "[]", ArgumentError, "teachers must name at least one model; got []"),
        ('["small"]', '"small"', ArgumentError, "teachers must be of type list of str; got 'small'"),
        ("0.25", "1.5", ArgumentError, "truth must be a share in [0, 1]; got 1.5"),
        ("truth", "trust", InputError, "[distillation]: unknown key 'trust'"),
        ('teachers = ["small"]', "", InputError, "teachers"),
        ('["small"]', "[1]", ArgumentError, "teachers must be of type list of str; got [1]"),
    ],
)
def test_wrong_sections_are_refused(tmp_path, old, new, error, message):
    path = tmp_path / "config.toml"
    path.write_text(CONFIG + SECTION.replace(old, new), "utf-8")
    with pytest.raises(error) as caught:
        load_config(str(path))
    assert message in caught.value.message


def test_a_share_of_slopes_is_a_share(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.replace("disparity = 0.25", "slopes = 2"), "utf-8")
    with pytest.raises(ArgumentError, match=r"slopes must be a share in \[0, 1\]; got 2"):
        load_config(str(path))
