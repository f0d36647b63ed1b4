"""What an upsampler is given: arrays and tensors of any type, checked, as tensors of the devices they are on."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddfup.errors import InputError

# What the brightest pixel is in guides of whole numbers.
_WHOLE_SCALES = {torch.uint8: 255.0, torch.uint16: 65535.0}
# Rows of a guide whose sums are taken at once: a float copy of a large picture would be four times its size.
_ROWS = 256


def depth_of(depth: NDArray[np.generic] | Tensor, valid: NDArray[np.generic] | Tensor | None) -> tuple[Tensor, Tensor]:
    """Check a depth map.

    Args:
        depth: (h, w), any unit; non-finite or 0 = no measurement.
        valid: (h, w); False = no measurement; None: finite and not 0.

    Returns:
        Depth, (1, 1, h, w) float32, 0 where there is no measurement, and where there is one, (1, 1, h, w) bool, on the
        device of ``depth``.

    Raises:
        InputError: If a shape or type is wrong, or no pixel is valid.
    """
    if depth.ndim != 2 or 0 in depth.shape:
        raise InputError(
            f"depth must be (h, w); got {tuple(depth.shape)}", "depth is one value per pixel, not a colour picture"
        )
    name = _type_of(depth)
    if not name.startswith(("int", "uint", "float", "bfloat")):
        raise InputError(f"depth must hold real numbers; got {name}")
    low = _single(depth)
    mask = low.isfinite()
    if valid is None:
        mask &= low != 0
    else:
        if valid.shape != depth.shape:
            raise InputError(f"valid must have the shape of depth = {tuple(depth.shape)}; got {tuple(valid.shape)}")
        # In its own type, of which float32 may know some values as 0.
        mask &= (valid.detach().to(torch.bool) if isinstance(valid, Tensor) else _tensor(valid != 0)).to(low.device)
    if not bool(mask.any()):
        raise InputError("depth has no valid pixel", "all values are 0, NaN or infinite, or marked invalid (--invalid)")
    return torch.where(mask, low, 0)[None, None], mask[None, None]


class Guide:
    """A photo, checked, on the device that it came on: whole numbers in their type, all else as float32.

    Args:
        image: (H, W, 3), (H, W) or, as a tensor, (3, H, W); uint8, uint16, or float in [0, 1].

    Raises:
        InputError: If the shape or type is wrong, or a float guide leaves [0, 1].
    """

    def __init__(self, image: NDArray[np.generic] | Tensor) -> None:
        if isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
            image = image.permute(1, 2, 0)
        if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)) or 0 in image.shape:
            raise InputError(f"guide must be (H, W, 3); got {tuple(image.shape)}")
        name = _type_of(image)
        if name in ("uint8", "uint16"):
            pixels = _tensor(image)
        elif "float" not in name:
            raise InputError(f"guide must be uint8, uint16, or float in [0, 1]; got {name}")
        else:
            pixels = _single(image)
            low, high = (float(end) for end in pixels.aminmax())
            if not (low >= 0 and high <= 1):
                raise InputError(
                    f"a float guide must lie in [0, 1]; got [{low:g}, {high:g}]", "divide by the largest value first"
                )
        self._pixels = pixels if pixels.ndim == 3 else pixels[:, :, None].expand(-1, -1, 3)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self._pixels.shape[0], self._pixels.shape[1]

    def to(self, device: torch.device) -> Guide:
        """Copy to a device if need be, as it is: bytes are a quarter of what a network reads."""
        moved = object.__new__(Guide)
        moved._pixels = self._pixels.to(device)
        return moved

    def part(self, top: int, bottom: int, left: int, right: int, device: torch.device | None = None) -> Tensor:
        """A rectangle as the networks read it: (1, 3, H', W') float32 in [0, 1], channels last in memory.

        Args:
            top: First row.
            bottom: Row after the last.
            left: First column.
            right: Column after the last.
            device: Where it is wanted; None: where the guide is.
        """
        return _unit(self._pixels[top:bottom, left:right].to(device)).permute(2, 0, 1)[None]

    def statistics(self) -> tuple[float, float]:
        """Mean and deviation over pixels and colours, in [0, 1]."""
        if self._pixels.device.type == "cpu":
            image = self._pixels.contiguous().numpy()
            means, deviations = cv2.meanStdDev(image.reshape(image.shape[0], -1))
            scale = _WHOLE_SCALES.get(self._pixels.dtype, 1.0)
            return float(means[0, 0]) / scale, float(deviations[0, 0]) / scale
        return banded_statistics(self._pixels)


def banded_statistics(pixels: Tensor) -> tuple[float, float]:
    """Mean and deviation in [0, 1] of a guide's pixels, (H, W, 3), on any device, without a float copy of them all."""
    bands = range(0, pixels.shape[0], _ROWS)
    sums = [_unit(pixels[y : y + _ROWS]).sum(dtype=torch.float64) for y in bands]
    mean = torch.stack(sums).sum() / pixels.numel()
    squares = [(_unit(pixels[y : y + _ROWS]) - mean).square().sum(dtype=torch.float64) for y in bands]
    return float(mean), float((torch.stack(squares).sum() / pixels.numel()).sqrt())


def nearest(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge a mask, (h, w) bool, to (H, W) by its nearest pixels."""

    def index(small: int, large: int) -> Tensor:
        centres = torch.arange(large, dtype=torch.float64, device=mask.device) + 0.5
        return (centres * small / large).long().clamp(max=small - 1)

    return mask[index(mask.shape[0], size[0])][:, index(mask.shape[1], size[1])]


def _type_of(data: NDArray[np.generic] | Tensor) -> str:
    """Name of the type of the numbers, such as "uint16", whatever their order of bytes."""
    return str(data.dtype).removeprefix("torch.") if isinstance(data, Tensor) else data.dtype.name


def _tensor(data: NDArray[np.generic] | Tensor) -> Tensor:
    """The same numbers as a tensor, without a copy where PyTorch can do without."""
    if isinstance(data, Tensor):
        return data.detach()
    # PyTorch knows one order of bytes, and warns of arrays that may not be written to, such as Pillow's. Both kinds are
    # copied.
    array = data.astype(data.dtype.newbyteorder("="), copy=False)
    array = np.require(array, requirements=("C_CONTIGUOUS", "WRITEABLE"))
    # An axis of one pixel counts as contiguous even if it runs backwards, which PyTorch does not take.
    return torch.from_numpy(array.copy() if min(array.strides, default=0) < 0 else array)


def _single(data: NDArray[np.generic] | Tensor) -> Tensor:
    """Real numbers of any type as float32."""
    if isinstance(data, Tensor):
        return data.detach().float()
    with np.errstate(over="ignore"):
        return _tensor(data.astype(np.float32, copy=False))


def _unit(pixels: Tensor) -> Tensor:
    """Bring a guide's pixels to float32 in [0, 1], contiguous."""
    scale = _WHOLE_SCALES.get(pixels.dtype)
    if pixels.dtype == torch.uint16:
        # PyTorch computes little with uint16.
        pixels = pixels.view(torch.int16).int() & 0xFFFF
    unit = pixels.contiguous().float()
    return unit if scale is None else unit.div_(scale)
