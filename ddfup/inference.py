"""From arrays or tensors to an upsampled depth map: device, precision, tiles, out-of-memory recovery."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddfup import inputs, models
from ddfup.devices import cudnn_search, find_device, full_float32, is_out_of_memory
from ddfup.errors import ArgumentError, DeviceError
from ddfup.graphs import Recorder
from ddfup.ops import native
from ddfup.sizes import check_sizes
from ddfup.tiling import Mosaic, Tile, tiles

# Side of a tile: large enough that the halo costs little, small enough for some hundreds of megabytes.
_TILE = {"cpu": 1280, "cuda": 2048}
# Images up to this many pixels run whole: no halo is computed twice. Larger ones would take twice the memory, on the
# CPU new memory at first, which costs more time than the halo.
_WHOLE_PIXELS = {"cpu": 1280 * 1280, "cuda": 8 << 20}
# A tile below this side has more halo than content; running out of memory there is final.
_SMALLEST_TILE = 512


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
        self._recorder = Recorder(self._network) if self._device.type == "cuda" else None

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
        low, mask = inputs.depth_of(depth, valid)
        image = inputs.Guide(guide)
        height, width = image.size
        check_sizes((low.shape[-1], low.shape[-2]), (width, height))
        with _memory_explained(self.device, image.size):
            with torch.inference_mode():
                result = self._run(low, mask, image)
                if not fill and not bool(mask.all()):
                    result[inputs.nearest(~mask[0, 0].to(self._device), image.size)] = torch.nan
            # A tensor that is copied here is an ordinary one, with which the user may go on to train.
            return result.to(depth.device, copy=True) if isinstance(depth, Tensor) else result.cpu().numpy()

    def _run(self, low: Tensor, mask: Tensor, image: inputs.Guide) -> Tensor:
        """Upsample with tiles as small as memory asks for; (H, W) on the device."""
        first = side = self._first_tile(*image.size)
        while True:
            try:
                # The photo crosses to a GPU once, though tiles are gone through twice; if memory is short, in parts.
                photo = image.to(self._device) if side == first else image
                return self._run_tiled(low.to(self._device), mask.to(self._device), photo, side)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                # What is kept of other sizes may be all that is missing.
                if not self.release():
                    smaller = (side if side is not None else max(image.size)) // 2
                    if self._tile == "none" or not isinstance(self._network, Tileable) or smaller < _SMALLEST_TILE:
                        raise
                    side = smaller
            if self._device.type == "cuda":
                # Only now: until here the error held what was computed before it.
                torch.cuda.empty_cache()

    def release(self) -> bool:
        """Give back the memory of a GPU that is kept for pictures of sizes that have come before.

        Returns:
            Whether there was any. Nothing is kept on the CPU.
        """
        if self._recorder is None:
            return False
        kept = self._recorder.forget()
        torch.cuda.empty_cache()
        return kept

    def _first_tile(self, height: int, width: int) -> int | None:
        """Side of the tiles to begin with; None: the whole image at once."""
        if not isinstance(self._network, Tileable) or self._tile == "none":
            return None
        if isinstance(self._tile, int):
            return self._tile
        kind = self._device.type if self._device.type in _TILE else "cuda"
        return None if height * width <= _WHOLE_PIXELS[kind] else _TILE[kind]

    def _run_tiled(self, depth: Tensor, valid: Tensor, image: inputs.Guide, side: int | None) -> Tensor:
        height, width = image.size

        def part(top: int, bottom: int, left: int, right: int) -> Tensor:
            return image.part(top, bottom, left, right, self._device)

        with self._settings(tiled=side is not None):
            if side is None:
                call = self._network if self._recorder is None else self._recorder
                return _result(call(depth, part(0, height, 0, width), valid))
            network = self._network
            assert isinstance(network, Tileable)
            mean, std = (torch.full((1, 1, 1, 1), value, device=self._device) for value in image.statistics())
            ratio = math.sqrt(height / depth.shape[-2] * width / depth.shape[-1])
            multiple, halo = network.tile_grid(ratio)
            # A tile that the halo of a large ratio would eat up grows rather than fails, unless the user set
            # its size.
            if side != self._tile:
                side = max(side, 4 * halo)
            grid = tiles(height, width, size=side, halo=halo, multiple=multiple)
            prepared = network.prepare(
                depth,
                valid,
                size=(height, width),
                guide_mean=mean,
                guide_std=std,
                parts=((tile, part(*tile.read)) for tile in grid),
            )
            whole = Mosaic(height, width)
            for tile in grid:
                top, _, left, _ = tile.read
                whole.put(tile, network.region(prepared, part(*tile.read), top, left))
            return _result(network.finish(prepared, whole.image))

    @contextlib.contextmanager
    def _settings(self, *, tiled: bool) -> Iterator[None]:
        with contextlib.ExitStack() as held:
            if self._dtype != torch.float32:
                held.enter_context(torch.autocast(self._device.type, self._dtype))
            elif self._device.type == "cuda":
                held.enter_context(full_float32)
            if tiled and self._device.type == "cuda":
                # Most tiles have one size. Of a whole picture's, nobody knows yet whether it comes again.
                held.enter_context(cudnn_search)
            yield


@contextlib.contextmanager
def _memory_explained(device: str, size: tuple[int, int]) -> Iterator[None]:
    """Turn the many errors that mean too little memory into one."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError(
            f"{device}: out of memory for a guide of {size[1]} x {size[0]} pixels",
            "use smaller tiles (--tile), another device (--device cpu) or the base model",
        ) from error


def _result(output: Tensor) -> Tensor:
    """(1, 1, H, W) of any precision to (H, W) float32."""
    return output[0, 0].float()


def _find_precision(precision: str, device: torch.device) -> torch.dtype:
    table = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in table:
        raise ArgumentError(f"precision must be one of {', '.join(table)}; got {precision!r}")
    if precision == "fp16" and device.type == "cpu":
        raise ArgumentError("precision fp16 is for GPUs; this is the CPU", "use --precision fp32 or bf16")
    return table[precision]
