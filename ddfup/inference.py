"""From numpy arrays to an upsampled depth map: checks, device, precision, tiles, out-of-memory recovery."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload, runtime_checkable

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddfup import models
from ddfup.devices import find_device, full_float32, is_out_of_memory
from ddfup.errors import ArgumentError, DeviceError, InputError
from ddfup.ops import native
from ddfup.sizes import check_sizes
from ddfup.tiling import Mosaic, Tile, tiles

# Side of a tile: large enough that the halo costs little, small enough for some hundreds of megabytes.
_TILE = {"cpu": 1280, "cuda": 2048}
# Images up to this many pixels run whole: no halo is computed twice. Larger ones would take twice the memory, on the
# CPU new memory at first, which costs more time than the halo.
_WHOLE_PIXELS = {"cpu": 1280 * 1280, "cuda": 8 << 20}
# What the brightest pixel is in guides of whole numbers.
_WHOLE_SCALES = {"uint8": 255.0, "uint16": 65535.0}
# A tile below this side has more halo than content; running out of memory there is final.
_SMALLEST_TILE = 512

_Number = TypeVar("_Number", bound=np.generic)


@runtime_checkable
class Tileable(Protocol):
    """A network that can be run part by part: what depends on the whole image is computed first, and once."""

    def prepare(
        self,
        depth: Tensor,
        valid: Tensor,
        *,
        size: tuple[int, int],
        guide_mean: Tensor,
        guide_std: Tensor,
        parts: Iterable[tuple[Tile, Tensor]],
    ) -> Any:
        """Compute what depends on the whole image, looking at its parts in turn if need be."""

    def region(self, prepared: Any, guide: Tensor, top: int = 0, left: int = 0) -> Tensor:
        """Estimate the depth of the part of the image that ``guide`` covers, (N, any, H', W')."""

    def finish(self, prepared: Any, estimate: Tensor) -> Tensor:
        """Make the result, (N, 1, H, W), of the estimates of all parts, put together."""

    def tile_grid(self, ratio: float) -> tuple[int, int]:
        """Multiple that tile offsets keep, and the halo after which a tile's estimate equals the whole's."""


class Upsampler:
    """A network on a device, ready to upsample depth maps.

    Args:
        model: Name of a bundled model, or a weight file.
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:i".
        precision: "auto" and "fp32" are float32; "bf16" and "fp16" (GPU only) trade accuracy for speed.
        tile: "auto", "none", or the side of a tile in pixels.

    Raises:
        WeightsError: If the model is unknown or damaged.
        DeviceError: If the device is absent.
        ArgumentError: If an option is unknown.

    Example:
        >>> upsampler = Upsampler("base")
        >>> upsampler(np.full((30, 40), 1.5), np.zeros((240, 320, 3), np.uint8)).shape
        (240, 320)
    """

    def __init__(
        self,
        model: str | Path = models.DEFAULT_MODEL,
        *,
        device: str = "auto",
        precision: str = "auto",
        tile: str | int = "auto",
    ) -> None:
        self._device = find_device(device)
        self._dtype = _find_precision(precision, self._device)
        if not (tile in ("auto", "none") or (isinstance(tile, int) and tile > 0)):
            raise ArgumentError(f"tile must be 'auto', 'none' or a number of pixels; got {tile!r}")
        self._tile = tile
        info = models.find_model(model)
        self.model_name = info.name
        self.weights_sha256 = info.sha256
        self._network = models.load_model(info.path, self._device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def device(self) -> str:
        """Where the network runs: "cpu" or "cuda:i"."""
        return str(self._device)

    @property
    def kernels(self) -> str:
        """Which kernels serve the filters: "native" or "torch"."""
        return "native" if native.is_loaded(self._device.type) else "torch"

    @overload
    def __call__(
        self,
        depth: NDArray[np.floating] | NDArray[np.integer],
        guide: NDArray[np.generic] | Tensor,
        *,
        valid: NDArray[np.bool_] | Tensor | None = None,
        fill: bool = False,
    ) -> NDArray[np.float32]: ...

    @overload
    def __call__(
        self,
        depth: Tensor,
        guide: NDArray[np.generic] | Tensor,
        *,
        valid: NDArray[np.bool_] | Tensor | None = None,
        fill: bool = False,
    ) -> Tensor: ...

    def __call__(
        self,
        depth: NDArray[np.floating] | NDArray[np.integer] | Tensor,
        guide: NDArray[np.generic] | Tensor,
        *,
        valid: NDArray[np.bool_] | Tensor | None = None,
        fill: bool = False,
    ) -> NDArray[np.float32] | Tensor:
        """Upsample one depth map to the size of its guide.

        Arrays and tensors are both taken, tensors of any device; a guide that is a tensor may have its channels
        first. No gradients are kept: networks to train are made by `load_model`.

        Args:
            depth: (h, w), any unit; non-finite or 0 = no measurement.
            guide: (H, W, 3), (H, W) or, as a tensor, (3, H, W); uint8, uint16, or float in [0, 1]; the same view,
                at least as large.
            valid: (h, w); False = no measurement; None: finite and not 0.
            fill: Also give depth where there was no measurement, rather than NaN.

        Returns:
            (H, W) float32 in the unit of ``depth``, NaN where the nearest low-resolution pixel has no measurement;
            an array or, if ``depth`` is a tensor, a tensor on its device.

        Raises:
            InputError: If a shape is wrong, the two do not fit each other, or no pixel is valid.
            DeviceError: If the device has too little memory even for the smallest tiles.
        """
        if isinstance(depth, Tensor):
            result = self(_to_array(depth), guide, valid=valid, fill=fill)
            return torch.from_numpy(result).to(depth.device)
        if isinstance(guide, Tensor):
            first = guide.ndim == 3 and guide.shape[0] == 3 and guide.shape[2] != 3
            guide = _to_array(guide.permute(1, 2, 0) if first else guide)
        if isinstance(valid, Tensor):
            valid = _to_array(valid)
        low, mask = _check_depth(depth, valid)
        image = _check_guide(guide)
        check_sizes((low.shape[1], low.shape[0]), (image.shape[1], image.shape[0]))
        result = self._run(low, mask, image)
        if not fill and not mask.all():
            result[_nearest(~mask, image.shape[:2])] = np.nan
        return result

    def _run(
        self, low: NDArray[np.float32], mask: NDArray[np.bool_], image: NDArray[np.generic]
    ) -> NDArray[np.float32]:
        side = self._first_tile(image.shape[0], image.shape[1])
        while True:
            try:
                return self._run_tiled(low, mask, image, side)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                smaller = (side if side is not None else max(image.shape[:2])) // 2
                can_tile = self._tile != "none" and isinstance(self._network, Tileable)
                if not can_tile or smaller < _SMALLEST_TILE:
                    raise DeviceError(
                        f"{self.device}: out of memory for a guide of {image.shape[1]} x {image.shape[0]} pixels",
                        "use smaller tiles (--tile), another device (--device cpu) or the base model",
                    ) from error
                side = smaller
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _first_tile(self, height: int, width: int) -> int | None:
        """Side of the tiles to begin with; None: the whole image at once."""
        if not isinstance(self._network, Tileable) or self._tile == "none":
            return None
        if isinstance(self._tile, int):
            return self._tile
        kind = self._device.type if self._device.type in _TILE else "cuda"
        return None if height * width <= _WHOLE_PIXELS[kind] else _TILE[kind]

    @torch.inference_mode()
    def _run_tiled(
        self, low: NDArray[np.float32], mask: NDArray[np.bool_], image: NDArray[np.generic], side: int | None
    ) -> NDArray[np.float32]:
        depth = torch.from_numpy(low)[None, None].to(self._device)
        valid = torch.from_numpy(mask)[None, None].to(self._device)
        height, width = image.shape[:2]
        with self._autocast():
            if side is None:
                return self._to_numpy(self._network(depth, self._to_tensor(image), valid))
            network = self._network
            assert isinstance(network, Tileable)
            mean, std = (torch.full((1, 1, 1, 1), value, device=self._device) for value in _statistics(image))
            ratio = math.sqrt(height / low.shape[0] * width / low.shape[1])
            multiple, halo = network.tile_grid(ratio)
            # A tile that the halo of a large ratio would eat up grows rather than fails, unless the user set
            # its size.
            if side != self._tile:
                side = max(side, 4 * halo)
            grid = tiles(height, width, size=side, halo=halo, multiple=multiple)

            def parts() -> Iterator[tuple[Tile, Tensor]]:
                for tile in grid:
                    top, bottom, left, right = tile.read
                    yield tile, self._to_tensor(image[top:bottom, left:right])

            prepared = network.prepare(
                depth, valid, size=(height, width), guide_mean=mean, guide_std=std, parts=parts()
            )
            whole = Mosaic(height, width)
            for tile, part in parts():
                top, left = tile.read[0], tile.read[2]
                whole.put(tile, network.region(prepared, part, top, left))
            return self._to_numpy(network.finish(prepared, whole.image))

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self._dtype != torch.float32:
            return torch.autocast(self._device.type, self._dtype)
        return contextlib.nullcontext() if self._device.type == "cpu" else full_float32

    def _to_tensor(self, image: NDArray[np.generic]) -> Tensor:
        """(H, W, 3) to (1, 3, H, W) float32 in [0, 1] on the device, channels last in memory."""
        if self._device.type == "cpu":
            tensor = torch.from_numpy(_for_torch(_to_unit(image)))
        else:
            tensor = _to_unit_on(image, self._device)
        return tensor.permute(2, 0, 1)[None]

    @staticmethod
    def _to_numpy(output: Tensor) -> NDArray[np.float32]:
        array: NDArray[np.float32] = output[0, 0].float().cpu().numpy()
        return array


def _to_array(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    # numpy has no bfloat16.
    array: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _to_unit(image: NDArray[np.generic]) -> NDArray[np.float32]:
    """Bring a guide of any accepted type to float32 in [0, 1]."""
    whole = _WHOLE_SCALES.get(image.dtype.name)
    unit: NDArray[np.float32] = image.astype(np.float32, copy=whole is not None)
    if whole is not None:
        unit /= np.float32(whole)
    return unit


def _for_torch(image: NDArray[_Number]) -> NDArray[_Number]:
    """Copy an array if need be: PyTorch warns of those that may not be written to, such as Pillow's."""
    return np.require(image, requirements=("C_CONTIGUOUS", "WRITEABLE"))


def _to_unit_on(image: NDArray[np.generic], device: torch.device) -> Tensor:
    """`_to_unit` on a device: a photo crosses the bus as it is, a quarter of the bytes, and is divided there."""
    image = _for_torch(image)
    if image.dtype == np.uint16:
        # PyTorch computes little with uint16.
        signed = torch.from_numpy(image.view(np.int16)).to(device)
        return (signed.int() & 0xFFFF).float() / 65535
    tensor = torch.from_numpy(image).to(device)
    return tensor.float() / 255 if image.dtype == np.uint8 else tensor.float()


def _statistics(image: NDArray[np.generic]) -> tuple[float, float]:
    """Mean and deviation of a guide in [0, 1], without a float copy of a large picture."""
    if image.dtype == np.float16:  # which OpenCV does not take
        image = image.astype(np.float32)
    mean, deviation = cv2.meanStdDev(np.ascontiguousarray(image).reshape(image.shape[0], -1))
    whole = _WHOLE_SCALES.get(image.dtype.name, 1.0)
    return float(mean[0, 0]) / whole, float(deviation[0, 0]) / whole


def _find_precision(precision: str, device: torch.device) -> torch.dtype:
    table = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in table:
        raise ArgumentError(f"precision must be one of {', '.join(table)}; got {precision!r}")
    if precision == "fp16" and device.type == "cpu":
        raise ArgumentError("precision fp16 is for GPUs; this is the CPU", "use --precision fp32 or bf16")
    return table[precision]


def _check_depth(
    depth: NDArray[np.generic], valid: NDArray[np.bool_] | None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    if depth.ndim != 2 or depth.size == 0:
        raise InputError(
            f"depth must be (h, w); got {depth.shape}", "depth is one value per pixel, not a colour picture"
        )
    if np.iscomplexobj(depth) or not np.issubdtype(depth.dtype, np.number):
        raise InputError(f"depth must hold real numbers; got {depth.dtype}")
    with np.errstate(over="ignore"):
        low = depth.astype(np.float32)
    mask = np.isfinite(low) & (low != 0)
    if valid is not None:
        if valid.shape != depth.shape:
            raise InputError(f"valid must have the shape of depth = {depth.shape}; got {valid.shape}")
        mask = np.isfinite(low) & (valid != 0)
    if not mask.any():
        raise InputError("depth has no valid pixel", "all values are 0, NaN or infinite, or marked invalid (--invalid)")
    return np.where(mask, low, np.float32(0)), mask


def _check_guide(guide: NDArray[np.generic]) -> NDArray[np.generic]:
    if guide.ndim == 2:
        guide = np.repeat(guide[:, :, None], 3, axis=2)
    if guide.ndim != 3 or guide.shape[2] != 3 or guide.size == 0:
        raise InputError(f"guide must be (H, W, 3); got {guide.shape}")
    # Files may have the other order of bytes, which PyTorch does not know.
    guide = guide.astype(guide.dtype.newbyteorder("="), copy=False)
    if guide.dtype.name in _WHOLE_SCALES:
        return guide
    if not np.issubdtype(guide.dtype, np.floating):
        raise InputError(f"guide must be uint8, uint16, or float in [0, 1]; got {guide.dtype}")
    low, high = float(guide.min()), float(guide.max())
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"a float guide must lie in [0, 1]; got [{low:g}, {high:g}]", "divide by the largest value first"
        )
    return guide


def _nearest(mask: NDArray[np.bool_], size: tuple[int, ...]) -> NDArray[np.bool_]:
    """Enlarge a mask by its nearest pixels."""
    rows, columns = (
        np.minimum((np.arange(large) + 0.5) * small / large, small - 1).astype(np.intp)
        for small, large in zip(mask.shape, size, strict=True)
    )
    return mask[np.ix_(rows, columns)]
