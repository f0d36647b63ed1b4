"""The figures of whole runs against hand computation, and what they must not depend on."""

import cv2
import numpy as np
import pytest
import torch
from networks import tiny_pyramid
from PIL import Image
from scenes import write_dataset

from ddfup import io, models
from ddfup.benchmark.baselines import BASELINES
from ddfup.benchmark.protocols import setup
from ddfup.benchmark.results import means
from ddfup.benchmark.run import check, find_pairs, make_methods, network, run
from ddfup.errors import ArgumentError, InputError, PairingError, WeightsError
from ddfup.inference import Upsampler

DISPARITY = {"unit": io.parse_unit("disparity"), "invalid": (float("nan"),)}


@pytest.fixture
def room(tmp_path):
    return write_dataset(tmp_path / "room", size=(50, 70))


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "tiny.safetensors"
    models.save_weights(path, tiny_pyramid(), architecture="pyramid", name="tiny", description="a test")
    return path


def figures(records, metric="rmse"):
    return {(r.image, r.degradation, r.factor, r.method): r.figures[metric] for r in records}


def some(*names):
    return {name: BASELINES[name] for name in names}


# --- protocols by hand ---


def bicubic_by_hand(path, factor, border):
    """RMSE of Pillow's bicubic down and up again, in stored numbers."""
    truth = np.array(Image.open(path)).astype(np.float32)
    truth = truth[: len(truth) // factor * factor, : truth.shape[1] // factor * factor]
    height, width = truth.shape
    low = Image.fromarray(truth).resize((width // factor, height // factor), Image.Resampling.BICUBIC)
    error = np.array(low.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64) - truth
    return np.sqrt(np.mean(error[border : height - border, border : width - border] ** 2))


def test_the_bicubic_row_by_hand(room):
    records = list(run(find_pairs(room), setup("bicubic"), some("bicubic")))
    cells = {cell.factor: cell for cell in means(records)}
    for factor in (4, 8, 16):
        # Stored are millimetres, told are centimetres; the mean is over images, not over pixels.
        errors = [bicubic_by_hand(room / "depth" / f"{i:02d}.png", factor, 6) / 10 for i in range(3)]
        assert [r.figures["rmse"] for r in records if r.factor == factor] == pytest.approx(errors, rel=1e-5)
        assert cells[factor].figures["rmse"] == pytest.approx(sum(errors) / 3, rel=1e-5)
        assert cells[factor].images == 3


def test_the_bicubic_row_of_grey_levels_by_hand(tmp_path):
    room = write_dataset(tmp_path / "grey", size=(50, 70), disparity=True)
    records = run(find_pairs(room), setup("bicubic", disparity=True), some("bicubic"), **DISPARITY)
    for record in records:
        expected = bicubic_by_hand(room / "depth" / f"{record.image}.png", int(record.factor), 0)
        assert record.figures["rmse"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_the_point_sampled_rows_by_hand(room, factor):
    records = run(find_pairs(room, limit=1), setup("point", factors=[factor]), some("nearest", "bilinear"))
    errors = {record.method: record.figures["rmse"] for record in records}
    truth = np.array(Image.open(room / "depth" / "00.png")).astype(np.float64) / 10
    truth = truth[: 50 // factor * factor, : 70 // factor * factor]
    begin = (factor - 1) // 2
    low = truth[begin::factor, begin::factor]
    wide = np.array(
        [np.interp(np.arange(truth.shape[1]), np.arange(begin, truth.shape[1], factor), row) for row in low]
    )
    linear = np.array(
        [np.interp(np.arange(len(truth)), np.arange(begin, len(truth), factor), column) for column in wide.T]
    ).T
    inside = np.s_[6:-6, 6:-6]
    assert errors["bilinear"] == pytest.approx(np.sqrt(np.mean((linear - truth)[inside] ** 2)), rel=1e-5)
    if factor == 3:
        block = np.repeat(np.repeat(low, 3, axis=0), 3, axis=1)
        assert errors["nearest"] == pytest.approx(np.sqrt(np.mean((block - truth)[inside] ** 2)), rel=1e-5)


def test_only_depth_measures_change_their_unit(room):
    plan = setup("bicubic", factors=[4])
    (record,) = run(find_pairs(room, limit=1), plan, some("bicubic"))
    assert record.figures["mae"] < record.figures["rmse"] < record.figures["edge_rmse"]
    assert record.figures["rmse"] > 1 and 0 < record.figures["delta1"] <= 1 and 0 < record.figures["abs_rel"] < 1
    assert record.figures["valid_fraction"] == 1


def test_holes_and_their_rims_by_hand(room):
    plan = setup("holes", factors=[4])
    seen = []

    def off_by_the_place(low, guide):
        # 3 cm off in holes, 2 cm beside them, 1 cm elsewhere.
        seen.append(low.valid)
        error = np.where(low.valid, 0.01, 0.03)
        for y, x in np.argwhere(low.valid):
            if not low.valid[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].all():
                error[y, x] = 0.02
        return true[: 4 * len(error), : 4 * error.shape[1]] + error.repeat(4, 0).repeat(4, 1)

    (pair,) = find_pairs(room, limit=1)
    true = io.read_depth(pair.depth).depth
    (record,) = run([pair], plan, {"off": off_by_the_place})
    assert 0.05 < 1 - seen[0].mean() <= 1 / 3
    assert record.figures["hole_rmse"] == pytest.approx(3, rel=1e-4)
    assert record.figures["rim_rmse"] == pytest.approx(2, rel=1e-4)
    (whole,) = run([pair], setup("bicubic", factors=[4]), some("bicubic"))
    assert np.isnan([whole.figures["hole_rmse"], whole.figures["rim_rmse"]]).all()


# --- what figures must not depend on ---


def test_noise_is_that_of_the_image_alone(room):
    plan = setup("robust", degradations=["sensor", "nearest"], factors=[2, 7.5])
    whole = figures(run(find_pairs(room), plan, some("nearest", "bicubic")))
    assert len(whole) == 3 * 2 * 2 * 2
    alone = setup("robust", degradations=["sensor"], factors=[7.5])
    part = figures(run(find_pairs(room, first=2), alone, some("bicubic")))
    assert part == {("02", "sensor", 7.5, "bicubic"): whole["02", "sensor", 7.5, "bicubic"]}


def test_tiles_and_threads_do_not_matter(tmp_path, weights):
    plan = setup("bicubic", factors=[4])
    pairs = find_pairs(write_dataset(tmp_path / "large", count=1, size=(160, 220)))
    before = torch.get_num_threads(), cv2.getNumThreads()
    found = []
    try:
        for tile, threads in (("none", 1), ("none", 2), (200, 1)):
            torch.set_num_threads(threads)
            cv2.setNumThreads(threads)
            methods = {**some("bicubic", "guided-filter"), "tiny": network(Upsampler(weights, device="cpu", tile=tile))}
            found.append(figures(run(pairs, plan, methods)))
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])
    first, *others = found
    for other in others:
        for key, value in other.items():
            assert value == (pytest.approx(first[key], rel=1e-5) if key[-1] == "tiny" else first[key]), key


def test_a_network_sees_the_low_resolution_and_fills_its_holes(room):
    calls = []

    def upsampler(depth, guide, *, valid, fill):
        calls.append((depth.shape, guide.shape, guide.dtype, valid.all(), fill))
        return np.full(guide.shape[:2], 2, np.float32)

    (record,) = run(find_pairs(room, limit=1), setup("bicubic", factors=[4]), {"two": network(upsampler)})
    assert calls == [((12, 17), (48, 68, 3), np.uint8, True, True)]
    truth = np.array(Image.open(room / "depth" / "00.png"))[:48, :68][6:-6, 6:-6] / 1000
    assert record.figures["mae"] == pytest.approx(100 * np.abs(truth - 2).mean(), rel=1e-5)


# --- methods ---


def test_methods_by_name(weights):
    methods, networks = make_methods(["bicubic", str(weights), "bicubic"], lambda name: Upsampler(name, device="cpu"))
    assert list(methods) == ["bicubic", "tiny"] and methods["bicubic"] is BASELINES["bicubic"]
    assert [n.model_name for n in networks] == ["tiny"]
    with pytest.raises(WeightsError, match="no model named 'bicupic'"):
        make_methods(["bicupic"], Upsampler)
    copy = weights.with_name("copy.safetensors")
    copy.write_bytes(weights.read_bytes())
    with pytest.raises(ArgumentError, match=r"names must be unique; 'tiny' of .*copy"):
        make_methods([str(weights), str(copy)], lambda name: Upsampler(name, device="cpu"))


# --- data sets ---


def test_which_images(tmp_path):
    room = write_dataset(tmp_path / "room", count=10, size=(8, 8))
    (room / "depth" / ".hidden").write_text("")
    (room / "rgb" / ".DS_Store").write_text("")

    def stems(**options):
        return [int(pair.stem) for pair in find_pairs(room, **options)]

    assert stems() == list(range(10))
    assert stems(first=3, last=5) == [3, 4, 5] and stems(first=8) == [8, 9]
    assert stems(limit=5) == [0, 2, 4, 6, 8] and stems(limit=4) == [0, 2, 5, 7]
    assert stems(first=2, limit=1) == [2] and stems(limit=99) == list(range(10))
    with pytest.raises(PairingError, match="no image from --first 10 on; there are 10"):
        stems(first=10)
    for wrong in ({"first": -1}, {"first": 3, "last": 2}, {"limit": 0}):
        with pytest.raises(ArgumentError, match="--"):
            stems(**wrong)


def test_pairs_must_be_pairs(tmp_path):
    room = write_dataset(tmp_path / "room", size=(8, 8))
    with pytest.raises(PairingError, match="nowhere/depth: must be a folder"):
        find_pairs(tmp_path / "nowhere")
    (room / "rgb" / "01.png").rename(tmp_path / "01.png")
    with pytest.raises(PairingError, match=r"room/rgb: must hold the partner of .*depth/01\.png; there is no 01\.\*"):
        find_pairs(room)
    (room / "depth" / "01.png").unlink()
    (room / "rgb" / "07.jpg").write_bytes(b"")
    with pytest.raises(PairingError, match=r"room/depth: must hold the partner of .*rgb/07\.jpg"):
        find_pairs(room)
    (room / "rgb" / "07.jpg").rename(room / "rgb" / "02.jpg")
    with pytest.raises(PairingError, match=r"02\.png: stems must be unique; 02\.jpg has the same"):
        find_pairs(room)


def test_headers_are_checked_before_any_work(room):
    plan = setup("bicubic")
    check(find_pairs(room), plan)
    check(find_pairs(room), setup("custom", border=23))
    with pytest.raises(InputError, match=r"00\.png: the image must be larger than twice the border of 24 .* 68x48"):
        check(find_pairs(room), setup("custom", border=24))
    with pytest.raises(InputError, match=r"00\.png: an image must be at least 64x64 pixels for x64; got 70x50"):
        check(find_pairs(room), setup(factors=[64]))
    guide = room / "rgb" / "02.png"
    Image.new("RGB", (70, 49)).save(guide)
    with pytest.raises(InputError, match=r"depth/02\.png: true depth must have the size of its guide .*rgb/02\.png"):
        check(find_pairs(room), plan)
    guide.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"rgb/02\.png"):
        check(find_pairs(room), plan)


def test_errors_of_figures_name_the_file(room):
    stored = np.zeros((50, 70), np.uint16)
    stored[:6] = 1000
    Image.fromarray(stored).save(room / "depth" / "01.png")
    with pytest.raises(InputError, match=r"depth/01\.png: no pixel is valid in both"):
        list(run(find_pairs(room), setup("bicubic", factors=[4]), some("bicubic")))
    stored[:6] = 0
    stored[0, 0] = 1000
    Image.fromarray(stored).save(room / "depth" / "01.png")
    with pytest.raises(InputError, match=r"depth/01\.png: the x4 bicubic low resolution has no measurement"):
        list(run(find_pairs(room), setup("bicubic", factors=[4]), some("bicubic")))
