"""Upsampler: what it takes, refuses and gives back, with tiny networks written as weight files."""

import math

import numpy as np
import pytest
import torch
from networks import pair, tiny_ddfupnet, tiny_pyramid

from ddfup import devices, inference, inputs, models
from ddfup.errors import ArgumentError, DeviceError, InputError, WeightsError
from ddfup.graphs import Recorder
from ddfup.inference import Upsampler


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "pyramid_tiny.safetensors"
    models.save_weights(path, tiny_pyramid(), architecture="pyramid", name="tiny", description="")
    return path


@pytest.fixture(scope="module")
def upsampler(weights):
    return Upsampler(weights, device="cpu")


def arrays(low, high, seed=0):
    depth, guide = pair(low, high, seed=seed)
    return depth[0, 0].numpy() / 250, (guide[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


# --- results ---


def test_it_is_the_network_on_the_normalised_guide(weights, upsampler):
    depth, guide = arrays((12, 16), (90, 120))
    with torch.no_grad():
        expected = models.load_model(weights)(
            torch.from_numpy(depth)[None, None], torch.from_numpy(guide).permute(2, 0, 1)[None] / 255
        )
    result = upsampler(depth, guide)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected[0, 0].numpy(), atol=1e-5)
    assert upsampler.model_name == "tiny"
    assert upsampler.weights_sha256 == models.read_info(weights).sha256
    assert upsampler.device == "cpu" and upsampler.kernels in ("native", "torch")


def test_guides_of_every_type_mean_the_same(upsampler):
    depth, guide = arrays((6, 8), (24, 32))
    expected = upsampler(depth, guide)
    unit = guide.astype(np.float64) / 255
    for other in (guide.astype(np.uint16) * 257, unit, unit.astype(np.float32)):
        np.testing.assert_allclose(upsampler(depth, other), expected, atol=1e-5)
    np.testing.assert_allclose(upsampler(depth, unit.astype(np.float16)), expected, atol=0.05)
    # Grey stands for three equal channels; memory order is of no matter, nor that of bytes.
    grey = guide[:, :, 0]
    np.testing.assert_array_equal(upsampler(depth, grey), upsampler(depth, np.stack([grey] * 3, axis=2)))
    np.testing.assert_array_equal(upsampler(depth, np.asfortranarray(guide)), expected)
    np.testing.assert_array_equal(upsampler(depth[::-1][::-1], guide[:, ::-1][:, ::-1]), expected)
    for other in (guide.astype(np.uint16) * 257, unit.astype(np.float32)):
        swapped = other.astype(other.dtype.newbyteorder())
        np.testing.assert_array_equal(upsampler(depth, swapped), upsampler(depth, other))


@pytest.mark.filterwarnings("error")
def test_a_guide_may_be_read_only(upsampler):
    depth, guide = arrays((6, 8), (24, 32))
    for picture in (guide, (guide / 255).astype(np.float32)):
        expected = upsampler(depth, picture)
        picture.flags.writeable = False
        np.testing.assert_array_equal(upsampler(depth, picture), expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float16, np.float64])
def test_depth_of_every_type_keeps_its_unit(upsampler, dtype):
    depth, guide = arrays((6, 8), (24, 32))
    whole = (depth * 250).astype(dtype)
    np.testing.assert_allclose(upsampler(whole, guide), upsampler(whole.astype(np.float32), guide), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint16])
def test_tensors_give_what_arrays_give(upsampler, dtype):
    depth, guide = arrays((12, 16), (48, 64))
    depth[2, 3] = 0
    given = torch.from_numpy(depth * 1000).to(dtype)
    picture = torch.from_numpy(guide)
    expected = upsampler(given.to(torch.float32).numpy(), guide)
    for image in (picture, picture.permute(2, 0, 1), picture.permute(2, 0, 1) / 255, guide):
        result = upsampler(given, image)
        assert isinstance(result, torch.Tensor) and result.dtype == torch.float32 and not result.requires_grad
        torch.testing.assert_close(result, torch.from_numpy(expected), rtol=1e-6, atol=1e-3, equal_nan=True)
    assert isinstance(upsampler(depth, picture), np.ndarray)


def test_tensors_with_masks_and_gradients(upsampler):
    depth, guide = arrays((12, 16), (48, 64))
    mask = np.ones(depth.shape, bool)
    mask[:3] = False
    given = torch.from_numpy(depth).requires_grad_()
    result = upsampler(given, torch.from_numpy(guide), valid=torch.from_numpy(mask))
    np.testing.assert_array_equal(result.numpy(), upsampler(depth, guide, valid=mask))
    assert np.isnan(result.numpy()[:12]).all() and not np.isnan(result.numpy()[12:]).any()
    with pytest.raises(InputError, match=r"guide must be \(H, W, 3\); got \(2, 48, 64\)"):
        upsampler(given, torch.zeros(2, 48, 64))


def test_tensors_stay_on_their_device(upsampler, monkeypatch):
    """Through numpy they could only go by way of the CPU."""
    depth, guide = arrays((12, 16), (48, 64))
    depth[2, 3] = 0
    expected = upsampler(depth, guide)

    def refuse(tensor):
        raise AssertionError("a tensor became an array")

    monkeypatch.setattr(torch.Tensor, "numpy", refuse)
    result = upsampler(torch.from_numpy(depth), torch.from_numpy(guide), valid=torch.from_numpy(depth != 0))
    assert torch.equal(result.isnan(), torch.from_numpy(np.isnan(expected)))
    torch.testing.assert_close(result, torch.from_numpy(expected), equal_nan=True)
    # One with which the user may go on to train.
    scale = torch.ones(48, 64, requires_grad=True)
    (scale * result.nan_to_num()).sum().backward()
    assert torch.equal(scale.grad, result.nan_to_num())


def test_inputs_are_not_changed(upsampler):
    depth, guide = arrays((6, 8), (24, 32))
    depth[2, 3] = np.nan
    before = depth.copy(), guide.copy()
    upsampler(depth, guide)
    np.testing.assert_array_equal(depth, before[0])
    np.testing.assert_array_equal(guide, before[1])


def test_holes_stay_holes_unless_filled(upsampler):
    depth, guide = arrays((6, 8), (24, 32))
    depth[1, 2], depth[4, 5], depth[0, 0] = 0, np.nan, np.inf
    result, filled = upsampler(depth, guide), upsampler(depth, guide, fill=True)
    holes = np.repeat(np.repeat(~(np.isfinite(depth) & (depth > 0)), 4, axis=0), 4, axis=1)
    np.testing.assert_array_equal(np.isnan(result), holes)
    assert np.isfinite(filled).all()
    np.testing.assert_array_equal(result[~holes], filled[~holes])


def test_holes_at_an_odd_ratio_are_those_of_the_nearest_pixel(upsampler):
    depth, guide = arrays((4, 6), (9, 14))
    depth[1, 2] = 0
    result = upsampler(depth, guide)
    rows, columns = (np.arange(9) + 0.5) * 4 / 9 - 0.5, (np.arange(14) + 0.5) * 6 / 14 - 0.5
    inside = (np.abs(rows - 1) < 0.49)[:, None] & (np.abs(columns - 2) < 0.49)
    outside = (np.abs(rows - 1) > 0.51)[:, None] | (np.abs(columns - 2) > 0.51)
    assert np.isnan(result[inside]).all() and np.isfinite(result[outside]).all()


def test_a_mask_replaces_the_meaning_of_zero(upsampler):
    depth, guide = arrays((6, 8), (24, 32))
    depth[0, 0] = 0
    everything = np.ones(depth.shape, bool)
    assert np.isfinite(upsampler(depth, guide, valid=everything)).all()
    masked = everything.copy()
    masked[2, 2] = False
    result = upsampler(depth, guide, valid=masked)
    assert np.isnan(result[8:12, 8:12]).all() and np.isnan(result).sum() == 16
    # What is masked or not finite does not count, whatever it is.
    depth[2, 2] = 1e6
    np.testing.assert_array_equal(upsampler(depth, guide, valid=masked), result)
    depth[2, 2] = np.nan
    np.testing.assert_array_equal(upsampler(depth, guide, valid=everything), result)
    np.testing.assert_array_equal(upsampler(depth, guide, valid=masked.astype(np.uint8)), result)


def test_a_ratio_of_one_filters(upsampler):
    depth, guide = arrays((20, 30), (20, 30))
    result = upsampler(depth, guide)
    assert result.shape == (20, 30) and np.isfinite(result).all()


def test_values_beyond_float32_are_no_measurement(upsampler):
    depth, guide = arrays((6, 8), (24, 32))
    wide = depth.astype(np.float64)
    wide[1, 1] = 1e300
    depth[1, 1] = 0
    np.testing.assert_array_equal(upsampler(wide, guide), upsampler(depth, guide))


# --- tiles and memory ---


@pytest.mark.parametrize(("low", "high"), [((20, 80), (60, 240)), ((9, 64), (67, 480)), ((30, 90), (30, 90))])
def test_tiles_change_nothing(weights, monkeypatch, low, high):
    depth, guide = arrays(low, high)
    depth[3, 4] = 0
    expected = Upsampler(weights, device="cpu", tile="none")(depth, guide, fill=True)
    for tile, whole in ((400, 1), ("auto", 1), ("auto", 3 << 20)):
        monkeypatch.setattr(inference, "_WHOLE_PIXELS", {"cpu": whole})
        monkeypatch.setattr(inference, "_TILE", {"cpu": 8})
        upsampler = Upsampler(weights, device="cpu", tile=tile)
        memory = Memory(upsampler, high[0] * high[1], RuntimeError("never"))
        result = upsampler(depth, guide, fill=True)
        np.testing.assert_allclose(result, expected, atol=1e-4 * np.ptp(depth[depth > 0]))
        # A tile that nobody asked for grows until it is more than halo.
        _, halo = upsampler._network.tile_grid(math.sqrt(high[0] / low[0] * high[1] / low[1]))
        side = 400 if tile == 400 else 4 * halo
        assert (len(memory.asked) > 1) == ((tile == 400 or whole == 1) and high[1] > side)


def test_a_tile_without_room_for_its_halo_is_refused(weights):
    depth, guide = arrays((20, 80), (60, 240))
    with pytest.raises(ArgumentError, match=r"tile must be larger than twice the overlap of .* pixels; got 16"):
        Upsampler(weights, device="cpu", tile=16)(depth, guide)


class Memory:
    """Stands before a network and runs out of memory for parts of more than ``limit`` pixels."""

    def __init__(self, upsampler, limit, error):
        self.asked, self.limit = [], limit
        network = upsampler._network
        region, forward = network.region, network.forward

        def check(part):
            self.asked.append(max(part.shape[-2:]))
            if part.shape[-1] * part.shape[-2] > self.limit:
                raise error

        def small_region(prepared, part, top=0, left=0):
            check(part)
            return region(prepared, part, top, left)

        def small_forward(depth, guide, valid=None):
            check(guide)
            # The network's own way to region() is not to be counted twice.
            network.region = region
            try:
                return forward(depth, guide, valid)
            finally:
                network.region = small_region

        network.region, network.forward = small_region, small_forward


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
def test_out_of_memory_halves_the_tiles(weights, error):
    depth, guide = arrays((8, 1100), (16, 2200))
    expected = Upsampler(weights, device="cpu")(depth, guide)
    upsampler = Upsampler(weights, device="cpu")
    memory = Memory(upsampler, 700 * 16, error)
    np.testing.assert_allclose(upsampler(depth, guide), expected, atol=1e-4 * np.ptp(depth))
    assert memory.asked[0] == 2200
    # 1100 was too much as well; 550 fits.
    assert 550 < memory.asked[1] <= 1100 and max(memory.asked[2:]) <= 550


@pytest.mark.parametrize("tile", ["auto", "none"])
def test_out_of_memory_first_costs_what_is_kept_of_other_sizes(weights, monkeypatch, tile):
    depth, guide = arrays((8, 1100), (16, 2200))
    expected = Upsampler(weights, device="cpu")(depth, guide)
    upsampler = Upsampler(weights, device="cpu", tile=tile)
    recorder = Recorder(upsampler._network, record=lambda function, inputs: lambda *later: function(*later))
    upsampler._recorder = recorder
    other = arrays((6, 8), (24, 32))
    for _ in range(2):
        upsampler(*other)
    memory = Memory(upsampler, 700 * 16, OUT_OF_MEMORY[0])
    forget = recorder.forget

    def give_back():
        kept = forget()
        if kept:
            # All of it fits now.
            memory.limit = 2200 * 16
        return kept

    monkeypatch.setattr(recorder, "forget", give_back)
    np.testing.assert_allclose(upsampler(depth, guide), expected, atol=1e-4 * np.ptp(depth))
    assert memory.asked == [2200, 2200]
    assert not upsampler.release()


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
@pytest.mark.parametrize("tile", ["auto", "none", 1024])
def test_out_of_memory_for_the_smallest_tiles_is_a_device_error(weights, tile, error):
    depth, guide = arrays((8, 1100), (16, 2200))
    upsampler = Upsampler(weights, device="cpu", tile=tile)
    memory = Memory(upsampler, 0, error)
    with pytest.raises(DeviceError, match="cpu: out of memory for a guide of 2200 x 16 pixels") as caught:
        upsampler(depth, guide)
    assert caught.value.exit_code == 8
    assert len(memory.asked) == {"auto": 3, "none": 1, 1024: 2}[tile]


@pytest.mark.parametrize("step", ["nearest", "Guide.to"])
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
def test_out_of_memory_beside_the_network_is_a_device_error(upsampler, monkeypatch, step, error):
    depth, guide = arrays((6, 8), (24, 32))
    depth[2, 3] = 0

    def refuse(*arguments):
        raise error

    owner, name = (inputs.Guide, "to") if step == "Guide.to" else (inputs, step)
    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(DeviceError, match="cpu: out of memory for a guide of 32 x 24 pixels"):
        upsampler(depth, guide)


def test_a_photo_that_does_not_fit_goes_in_parts(weights, monkeypatch):
    depth, guide = arrays((8, 1100), (16, 2200))
    expected = Upsampler(weights, device="cpu")(depth, guide)
    moved = []

    def refuse(photo, device):
        moved.append(photo.size)
        raise OUT_OF_MEMORY[0]

    monkeypatch.setattr(inputs.Guide, "to", refuse)
    result = Upsampler(weights, device="cpu")(depth, guide)
    np.testing.assert_allclose(result, expected, atol=1e-4 * np.ptp(depth))
    assert moved == [(16, 2200)]


def test_halving_never_blames_the_user_for_a_small_tile(weights):
    # At x32 two halos are more than the halved tile.
    depth, guide = arrays((1, 70), (32, 2240))
    upsampler = Upsampler(weights, device="cpu", tile=2048)
    Memory(upsampler, 0, OUT_OF_MEMORY[0])
    with pytest.raises(DeviceError, match="out of memory"):
        upsampler(depth, guide)


def test_other_errors_of_the_network_pass(weights):
    depth, guide = arrays((6, 8), (24, 32))
    upsampler = Upsampler(weights, device="cpu")
    Memory(upsampler, 0, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        upsampler(depth, guide)


def test_a_network_without_tiles_runs_whole(tmp_path):
    path = tmp_path / "w.safetensors"
    models.save_weights(path, tiny_ddfupnet(4), architecture="ddfupnet", name="x4", description="")
    depth, guide = arrays((6, 8), (24, 32))
    expected = Upsampler(path, device="cpu", tile="none")(depth, guide)
    np.testing.assert_array_equal(Upsampler(path, device="cpu", tile=16)(depth, guide), expected)


# --- what is refused ---


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (np.ones((6, 8, 3)), r"depth must be \(h, w\); got \(6, 8, 3\)"),
        (np.ones((0, 8)), r"depth must be \(h, w\); got \(0, 8\)"),
        (np.ones(8), r"depth must be \(h, w\); got \(8,\)"),
        (np.ones((6, 8), complex), "depth must hold real numbers; got complex128"),
        (np.ones((6, 8), bool), "depth must hold real numbers; got bool"),
        (np.full((6, 8), "x"), "depth must hold real numbers; got str32"),
        (np.zeros((6, 8)), "depth has no valid pixel"),
        (np.full((6, 8), np.nan), "depth has no valid pixel"),
        (np.ones((48, 64)), "must not be larger than its guide: depth is 64x48, guide is 32x24"),
        (np.ones((8, 6)), "must show the same view .*: depth is 6x8, guide is 32x24, 77.8% off"),
        (np.ones((20, 32)), "must show the same view .* 20.* off|must show the same view .* 16.7% off"),
    ],
)
def test_wrong_depth_is_refused(upsampler, depth, message):
    with pytest.raises(InputError, match=message) as caught:
        upsampler(depth, np.zeros((24, 32, 3), np.uint8))
    assert caught.value.hint or "real numbers" in message


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (np.zeros((24, 32, 4), np.uint8), r"guide must be \(H, W, 3\); got \(24, 32, 4\)"),
        (np.zeros((0, 32, 3), np.uint8), r"guide must be \(H, W, 3\); got \(0, 32, 3\)"),
        (np.zeros(32, np.uint8), r"guide must be \(H, W, 3\); got \(32,\)"),
        (np.zeros((24, 32, 3), np.int64), "guide must be uint8, uint16, or float in .*; got int64"),
        (np.zeros((24, 32, 3), bool), "guide must be uint8, uint16, or float in .*; got bool"),
        (np.full((24, 32, 3), 255.0), r"a float guide must lie in \[0, 1\]; got \[255, 255\]"),
        (np.full((24, 32, 3), -0.1), r"a float guide must lie in \[0, 1\]"),
        (np.full((24, 32, 3), np.nan), r"a float guide must lie in \[0, 1\]"),
    ],
)
def test_wrong_guides_are_refused(upsampler, guide, message):
    with pytest.raises(InputError, match=message):
        upsampler(np.ones((6, 8)), guide)


def test_wrong_masks_are_refused(upsampler):
    guide = np.zeros((24, 32, 3), np.uint8)
    with pytest.raises(InputError, match=r"valid must have the shape of depth = \(6, 8\); got \(8, 6\)"):
        upsampler(np.ones((6, 8)), guide, valid=np.ones((8, 6), bool))
    with pytest.raises(InputError, match="depth has no valid pixel"):
        upsampler(np.ones((6, 8)), guide, valid=np.zeros((6, 8), bool))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device must be 'auto', 'cpu', 'cuda' or 'cuda:i'; got 'gpu'"),
        ({"device": "meta"}, "device must be .*; got 'meta'"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16, fp16; got 'fp8'"),
        ({"device": "cpu", "precision": "fp16"}, "precision fp16 is for GPUs"),
        ({"tile": 0}, "tile must be 'auto', 'none' or a number of pixels; got 0"),
        ({"tile": "big"}, "tile must be .*; got 'big'"),
    ],
)
def test_wrong_options_are_refused(weights, options, message):
    with pytest.raises(ArgumentError, match=message):
        Upsampler(weights, **options)


def test_absent_devices_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.find_device("auto") == torch.device("cpu")
    with pytest.raises(DeviceError, match="device 'cuda:1': this PyTorch sees no CUDA GPU"):
        devices.find_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="device 'cuda:2': there are 2 GPUs, counted from 0"):
        devices.find_device("cuda:2")
    assert devices.find_device("auto") == devices.find_device("cuda") == torch.device("cuda", 0)
    # Under torchrun every process has its own.
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.find_device("auto") == devices.find_device("cuda") == torch.device("cuda", 1)
    assert devices.find_device("cuda:0") == torch.device("cuda", 0)


def test_unknown_models_are_refused():
    with pytest.raises(WeightsError, match="no model named 'nothing'"):
        Upsampler("nothing", device="cpu")


def test_half_precision_is_close(weights):
    depth, guide = arrays((12, 16), (48, 64))
    exact = Upsampler(weights, device="cpu")(depth, guide)
    half = Upsampler(weights, device="cpu", precision="bf16")(depth, guide)
    assert half.dtype == np.float32
    difference = np.abs(half - exact).mean()
    assert 0 < difference < 0.05 * np.ptp(depth)
