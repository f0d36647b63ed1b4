"""Arrays and tensors as tensors of the device they are on; numpy's float64 is the oracle."""

import numpy as np
import pytest
import torch

from ddfup import inputs
from ddfup.errors import InputError

GUIDES = [np.uint8, np.uint16, np.float16, np.float32, np.float64]


def picture(dtype):
    """A guide with the largest and smallest values of its type, read only."""
    image = np.linspace(0, 1, 37 * 41 * 3).reshape(37, 41, 3) ** 2
    image = (image * np.iinfo(dtype).max).astype(dtype) if np.issubdtype(dtype, np.integer) else image.astype(dtype)
    image.flags.writeable = False
    return image


def unit(image):
    scale = np.iinfo(image.dtype).max if np.issubdtype(image.dtype, np.integer) else 1
    return image.astype(np.float64) / scale


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", GUIDES)
def test_parts_of_a_guide_are_its_pixels(dtype):
    image = picture(dtype)
    swapped = image.astype(image.dtype.newbyteorder())
    # Also single rows and columns, backwards.
    for view in (image, image[::-1, 3:], swapped, image[20:21][::-1], image[:, 5:6][:, ::-1]):
        height, width = view.shape[:2]
        top, bottom, left, right = height // 4, height - height // 5, width // 4, width - width // 5
        part = inputs.Guide(view).part(top, bottom, left, right)
        assert part.dtype == torch.float32 and part.permute(0, 2, 3, 1).is_contiguous()
        expected = unit(view)[top:bottom, left:right].transpose(2, 0, 1)[None]
        np.testing.assert_array_equal(part.numpy(), expected.astype(np.float32))


def test_grey_guides_and_guides_with_channels_first():
    grey = inputs.Guide(picture(np.uint8)[:, :, 1])
    assert grey.size == (37, 41)
    np.testing.assert_array_equal(
        grey.part(0, 37, 0, 41).numpy(), np.repeat(unit(picture(np.uint8))[None, None, ..., 1], 3, 1).astype(np.float32)
    )
    first = torch.from_numpy(picture(np.uint16).copy()).permute(2, 0, 1)
    expected = inputs.Guide(picture(np.uint16)).part(0, 37, 0, 41)
    assert torch.equal(inputs.Guide(first).part(0, 37, 0, 41), expected)


@pytest.mark.parametrize("dtype", GUIDES)
def test_statistics_of_a_guide_are_numpys(dtype):
    # Guides in float64 are held in float32.
    tolerance = 1e-6 if dtype == np.float64 else 1e-9
    for view in (picture(dtype), picture(dtype)[::2, 3:], picture(dtype)[..., 0]):
        wide = unit(view)
        np.testing.assert_allclose(inputs.Guide(view).statistics(), (wide.mean(), wide.std()), rtol=tolerance)


@pytest.mark.parametrize("dtype", GUIDES)
def test_statistics_on_other_devices_are_numpys(dtype, monkeypatch):
    """What a GPU does, on the CPU: bands of rows, none of them the whole."""
    monkeypatch.setattr(inputs, "_ROWS", 10)
    wide = unit(picture(dtype))
    guide = inputs.Guide(picture(dtype))
    np.testing.assert_allclose(inputs.banded_statistics(guide._pixels), (wide.mean(), wide.std()), rtol=1e-6)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint16, torch.uint8, torch.int64]
)
def test_depth_of_every_type(dtype):
    values = torch.tensor([[0, 1, 2], [3, 40, 250]]).to(dtype)
    depth, mask = inputs.depth_of(values, None)
    assert depth.dtype == torch.float32 and depth.shape == mask.shape == (1, 1, 2, 3)
    assert depth.flatten().tolist() == [0, 1, 2, 3, 40, 250]
    assert mask.flatten().tolist() == [False, True, True, True, True, True]
    again, valid = inputs.depth_of(values, torch.tensor([[1, 1, 0], [1, 1, 1]]).to(dtype))
    assert again.flatten().tolist() == [0, 1, 0, 3, 40, 250]
    assert valid.flatten().tolist() == [True, True, False, True, True, True]


def test_what_is_not_finite_is_no_measurement():
    values = np.array([[np.nan, np.inf, 1.0], [-np.inf, 1e300, 2.0]])
    depth, mask = inputs.depth_of(values, None)
    assert mask.flatten().tolist() == [False, False, True, False, False, True]  # 1e300 is beyond float32
    assert depth.flatten().tolist() == [0, 0, 1, 0, 0, 2]
    assert torch.equal(inputs.depth_of(values, np.ones((2, 3)))[1], mask)


@pytest.mark.parametrize(
    "valid", [np.full((1, 5), 1e-60), np.full((1, 5), 1j), torch.full((1, 5), 1e-60).double() + 1e-60]
)
def test_masks_may_be_of_any_type(valid):
    depth = np.arange(5, dtype=np.float32)[None]
    for given in (depth, depth[::-1], torch.from_numpy(depth)):
        values, mask = inputs.depth_of(given, valid)
        assert mask.all() and values.flatten().tolist() == [0, 1, 2, 3, 4]


def test_parameters_and_tensors_of_inference_mode():
    with torch.inference_mode():
        made = torch.full((2, 2), 3.0)
    for given in (made, torch.nn.Parameter(torch.full((2, 2), 3.0)), torch.full((2, 2), 3.0, requires_grad=True)):
        depth, _ = inputs.depth_of(given, None)
        assert depth.flatten().tolist() == [3, 3, 3, 3] and not depth.requires_grad


@pytest.mark.parametrize(
    ("depth", "valid", "message"),
    [
        (np.zeros((2, 2, 3)), None, r"depth must be \(h, w\); got \(2, 2, 3\)"),
        (torch.zeros(0, 3), None, r"depth must be \(h, w\); got \(0, 3\)"),
        (np.zeros((2, 2), complex), None, "depth must hold real numbers; got complex128"),
        (torch.zeros(2, 2, dtype=torch.complex64), None, "depth must hold real numbers; got complex64"),
        (torch.ones(2, 2, dtype=torch.bool), None, "depth must hold real numbers; got bool"),
        (np.array([["a", "b"]]), None, "depth must hold real numbers; got str"),
        (np.ones((2, 2)), np.ones((2, 3)), r"valid must have the shape of depth = \(2, 2\); got \(2, 3\)"),
        (np.ones((2, 2)), np.zeros((2, 2)), "depth has no valid pixel"),
    ],
)
def test_depth_that_is_none(depth, valid, message):
    with pytest.raises(InputError, match=message):
        inputs.depth_of(depth, valid)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (np.zeros((4, 5, 4), np.uint8), r"guide must be \(H, W, 3\); got \(4, 5, 4\)"),
        (torch.zeros(2, 4, 5), r"guide must be \(H, W, 3\); got \(2, 4, 5\)"),
        (np.zeros((4, 0, 3), np.uint8), r"guide must be \(H, W, 3\); got \(4, 0, 3\)"),
        (np.zeros((4, 5, 3), np.int32), "guide must be uint8, uint16, or float in .*; got int32"),
        (torch.zeros(4, 5, 3, dtype=torch.int64), "guide must be uint8, uint16, or float in .*; got int64"),
        (np.full((4, 5, 3), 1.5), r"a float guide must lie in \[0, 1\]; got \[1.5, 1.5\]"),
        (torch.full((4, 5), torch.nan), r"a float guide must lie in \[0, 1\]; got \[nan, nan\]"),
    ],
)
def test_a_guide_that_is_none(guide, message):
    with pytest.raises(InputError, match=message):
        inputs.Guide(guide)


@pytest.mark.parametrize(("small", "large"), [((3, 4), (7, 9)), ((5, 5), (5, 12)), ((2, 3), (64, 96))])
def test_a_mask_is_enlarged_by_its_nearest_pixels(small, large):
    mask = torch.rand(small, generator=torch.Generator().manual_seed(0)) < 0.5
    enlarged = inputs.nearest(mask, large)
    for y in range(large[0]):
        for x in range(large[1]):
            row = min(range(small[0]), key=lambda r: abs((r + 0.5) * large[0] - (y + 0.5) * small[0]))
            column = min(range(small[1]), key=lambda c: abs((c + 0.5) * large[1] - (x + 0.5) * small[1]))
            centre = [((k + 0.5) * s / n) % 1 for k, s, n in ((y, small[0], large[0]), (x, small[1], large[1]))]
            if 0.0 not in centre:  # two are as near
                assert enlarged[y, x] == mask[row, column]
