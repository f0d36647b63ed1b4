"""The pictures of a report: full size for the folder beside the page, thumbnails for the page itself."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddfup.errors import InputError
from ddfup.preview import Picture, Scale, depth_scale, error_scale

# From good to small; the first that fits its share of the page is taken.
_SIDES = (480, 320, 240, 160, 128, 96)
_QUALITIES = (78, 60, 40)
# What JPEG can hold.
_LARGEST_SIDE = 65500


@dataclass(frozen=True)
class Shown:
    """One picture.

    Attributes:
        full: The file for the folder.
        suffix: Its suffix.
        thumbnail: WebP; empty if none is small enough.
        width: Columns of the full picture.
        height: Rows of the full picture.
    """

    full: bytes
    suffix: str
    thumbnail: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Pictures:
    """What a report shows of one image.

    Attributes:
        shown: Of ``guide``, ``input``, ``result``, ``truth``, ``error`` those that there are.
        depth: (low, high) ends of the colours of depth.
        error: Largest error of the error map's colours; larger ones look like it.
    """

    shown: dict[str, Shown]
    depth: tuple[float, float]
    error: float


def paint(
    prediction: NDArray[np.float32],
    truth: NDArray[np.float32],
    *,
    guide: NDArray[Any] | None,
    low: NDArray[np.float32] | None,
    label: str,
    thumbnail_bytes: int,
    thumbnail_side: int,
) -> Pictures:
    """Paint one image; all depth maps share one scale.

    Args:
        prediction: (H, W) depth; NaN = none.
        truth: (H, W) depth; NaN = none.
        guide: (H', W', 3) uint8 or uint16 picture, or None.
        low: (h, w) low-resolution depth, or None.
        label: Unit of the depth.
        thumbnail_bytes: Most bytes of one thumbnail.
        thumbnail_side: Longest side of a thumbnail, in pixels.
    """
    maps = [prediction, truth] if low is None else [low, prediction, truth]
    scale = depth_scale(*maps, label=label)
    gap = np.abs(prediction - truth)
    gap_scale = error_scale(gap, label=label)
    pictures: dict[str, Picture] = {}
    if guide is not None:
        pictures["guide"] = guide if guide.dtype == np.uint8 else (guide >> 8).astype(np.uint8)
    if low is not None:
        pictures["input"] = scale.paint(low)
    pictures |= {"result": scale.paint(prediction), "truth": scale.paint(truth), "error": gap_scale.paint(gap)}
    shown = {}
    for name, picture in pictures.items():
        # Pixels of the input are to be seen as such: its file is exact, and small anyway.
        full, suffix = (_png(picture), ".png") if name == "input" else (_jpeg(picture), ".jpg")
        thumbnail = _thumbnail(picture, thumbnail_bytes, thumbnail_side)
        shown[name] = Shown(full, suffix, thumbnail, picture.shape[1], picture.shape[0])
    return Pictures(shown, (scale.low, scale.high), gap_scale.high)


def stops(scale: Scale, count: int = 9) -> list[str]:
    """Return ``#rrggbb`` colours from the low to the high end of a scale."""
    chosen = scale.colours[np.linspace(0, 255, count).round().astype(np.intp)]
    return ["#" + bytes(colour.tolist()).hex() for colour in chosen]


def _thumbnail(picture: Picture, most: int, side: int) -> bytes:
    """Return the best WebP of at most ``most`` bytes, or nothing."""
    longest = max(picture.shape[:2])
    for width in (min(side, longest), *(each for each in _SIDES if each < min(side, longest))):
        small = _shrink(picture, width)
        for quality in _QUALITIES:
            data = _webp(small, quality)
            if len(data) <= most:
                return data
    return b""


def _shrink(picture: Picture, longest: int) -> Picture:
    import cv2

    height, width = picture.shape[:2]
    factor = longest / max(height, width)
    if factor >= 1:
        return picture
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def _webp(picture: Picture, quality: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=quality, method=3)
    return buffer.getvalue()


def _jpeg(picture: Picture) -> bytes:
    """Encode with all of the colour's resolution: colour is what a depth picture consists of."""
    import cv2

    picture = _shrink(picture, _LARGEST_SIDE)
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        92,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    done, data = cv2.imencode(".jpg", np.ascontiguousarray(picture[:, :, ::-1]), options)
    if not done:
        raise InputError(f"a picture of {picture.shape[1]}x{picture.shape[0]} must encode as JPEG; it did not")
    return bytes(data)


def _png(picture: Picture) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()
