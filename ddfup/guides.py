"""Guide pictures: whatever a camera, an editor or a renderer saves, read as upright RGB of 8 or 16 bits."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddfup._stderr import quiet_stderr
from ddfup.errors import InputError
from ddfup.formats.base import AGAIN, DEFAULT_MAX_PIXELS, check_pixels, check_ratio, decoding, read_start
from ddfup.formats.exr import EXR_MAGIC, ExrHeader, exr_header, exr_pixels
from ddfup.formats.orientation import ORIENTATION_TAG, UPRIGHT, known_orientation, upright, upright_size
from ddfup.formats.png import PNG_MAGIC, png_orientation, png_read
from ddfup.formats.tiff import TIFF_MAGICS, tiff_orientation, tiff_page

# Pictures of several frames (MPO, what iPhones write) come in through Pillow's JPEG reader.
GUIDE_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP")
_MAGICS = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (PNG_MAGIC,),
    "TIFF": TIFF_MAGICS,
    "WebP": (b"RIFF",),
    "EXR": (EXR_MAGIC,),
}
# PhotometricInterpretation of TIFF, as far as 16 bits are read.
_TIFF_COLOURS = {0: "white is 0", 1: "black is 0", 2: "RGB", 5: "inks"}
_PILLOW_LIMIT = threading.Lock()
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
# A renderer's brightest half percent (lamps, the sun) may be white without detail.
_EXR_WHITE_PERCENTILE = 99.5


@dataclass(frozen=True)
class GuideHeader:
    """What a guide's header says.

    Attributes:
        width: Columns of the upright picture.
        height: Rows of the upright picture.
        orientation: EXIF orientation, 1 to 8.
        format: ``JPEG``, ``PNG``, ``TIFF``, ``WEBP``, ``EXR``, ``HEIC`` or ``MPO``.
        decoder: Who reads it: ``pillow``, for 16 bits ``png`` or ``tiff``, else ``exr`` or ``heif``.
    """

    width: int
    height: int
    orientation: int
    format: str
    decoder: str


def read_guide_header(path: Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> GuideHeader:
    """Check everything about a guide that can be known without decoding it.

    Raises:
        InputError: If the file is missing, no picture, damaged or too large.
    """
    start = read_start(path)
    with decoding(path, _kind(start)):
        orientation = UPRIGHT
        if start.startswith(TIFF_MAGICS):
            # Pillow cannot open every 16-bit TIFF, so the header is read by the one who will decode it.
            with tiff_page(path) as page:
                orientation = tiff_orientation(page)
                size = (int(page.imagewidth), int(page.imagelength))
                kind, decoder = "TIFF", "tiff" if page.dtype == np.uint16 else "pillow"
                _check_tiff(path, page)
        elif start.startswith(PNG_MAGIC):
            # Not by Pillow: looking for EXIF, it would decode the picture before its size is checked.
            kind, decoder = "PNG", "png" if start[24] == 16 else "pillow"
            size = struct.unpack(">II", start[16:24])
            orientation = png_orientation(path)
        elif start.startswith(EXR_MAGIC):
            exr = exr_header(path)
            _colour_channels(path, exr)
            size, kind, decoder = exr.size, "EXR", "exr"
        elif start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
            # Its own turns are part of decoding; EXIF only repeats them.
            size, kind, decoder = _open_heif(path).size, "HEIC", "heif"
        else:
            if canvas := _webp_canvas(start):
                # Pillow would make its canvas, several times, before its size could be checked.
                check_pixels(path, *canvas, max_pixels)
                check_ratio(path, 3 * canvas[0] * canvas[1], path.stat().st_size)
            with _pillow(path) as picture:
                size, kind, decoder = picture.size, str(picture.format), "pillow"
                orientation = known_orientation(picture.getexif().get(ORIENTATION_TAG))
    check_pixels(path, *size, max_pixels)
    check_ratio(path, 3 * size[0] * size[1], path.stat().st_size)
    return GuideHeader(*upright_size(*size, orientation), orientation, kind, decoder)


def read_guide(path: Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Read a guide picture, upright, as (H, W, 3) RGB of 8 or 16 bits.

    Grey is repeated, alpha dropped, palettes and CMYK converted, EXIF orientation applied. EXR holds linear
    light: it is scaled so that its 99.5th percentile is at most white, clipped, given the curve of sRGB, and
    brought to 16 bits.

    Args:
        path: JPEG, PNG, TIFF, WebP or EXR file, or HEIC where pillow-heif is installed.
        max_pixels: Largest number of pixels allowed, checked before decoding.

    Raises:
        InputError: If the file cannot be used.
    """
    header = read_guide_header(path, max_pixels=max_pixels)
    with decoding(path, header.format):
        if header.decoder == "pillow":
            with quiet_stderr() if header.format == "TIFF" else nullcontext():
                return _read_8bit_guide(path, header.orientation)
        if header.decoder == "exr":
            return _read_exr_guide(path)
        if header.decoder == "heif":
            return np.array(_open_heif(path).to_pillow().convert("RGB"))
        if header.decoder == "png":
            image = png_read(path)
        else:
            with tiff_page(path) as page:
                image = _read_16bit_tiff(page)
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim != 3 or image.shape[-1] not in (1, 2, 3, 4):
            raise InputError(f"{path}: a guide must have 1 to 4 channels; got shape {image.shape}", "save it as PNG")
        image = image[..., :1].repeat(3, axis=-1) if image.shape[-1] <= 2 else image[..., :3]
        return np.ascontiguousarray(upright(image, header.orientation))


def _kind(start: bytes) -> str:
    """Return the name of a file's format by what it begins with."""
    return next((name for name, magics in _MAGICS.items() if start.startswith(magics)), "picture")


def _webp_canvas(start: bytes) -> tuple[int, int] | None:
    """Width and height of a WebP picture by its first 64 bytes; None: it is another picture."""
    # https://developers.google.com/speed/webp/docs/riff_container; lossy frames: RFC 6386, section 9.1.
    kind, body = start[8:16], start[20:30]
    if start[:4] != b"RIFF" or len(body) < 10:
        return None
    if kind == b"WEBPVP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"WEBPVP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"WEBPVP8 ":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    return None


def _read_8bit_guide(path: Path, orientation: int) -> NDArray[np.uint8]:
    with _pillow(path) as picture:
        if picture.mode in ("F", "I") or picture.mode.startswith("I;"):
            raise InputError(
                f"{path}: a guide must have 8 or 16 bits per channel; got Pillow mode {picture.mode!r}",
                "is this the depth file? save the guide as PNG or JPEG",
            )
        image = np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
        # Pillow turns TIFF pictures by itself, and only these.
        return image if picture.format == "TIFF" else np.ascontiguousarray(upright(image, orientation))


def _check_tiff(path: Path, page: Any) -> None:
    """Refuse what neither Pillow nor the reader of 16 bits can make a picture of."""
    dtype = None if page.dtype is None else np.dtype(page.dtype)
    if dtype is not None and (dtype.kind == "f" or dtype.itemsize > 2):
        raise InputError(
            f"{path}: a guide must have 8 or 16 bits per channel; got {dtype}",
            "is this the depth file? save the guide as PNG or JPEG",
        )
    if dtype == np.uint16 and page.photometric not in _TIFF_COLOURS:
        name = getattr(page.photometric, "name", page.photometric)
        raise InputError(
            f"{path}: a guide of 16 bits must be grey, RGB or CMYK; got {name}", "save the guide as RGB, or with 8 bits"
        )


def _read_16bit_tiff(page: Any) -> NDArray[np.uint16]:
    """Return grey or RGB, with or without alpha, (H, W) or (H, W, channels)."""
    image: NDArray[np.uint16] = page.asarray()
    if image.ndim == 3 and page.planarconfig == 2:
        image = np.moveaxis(image, 0, -1)
    kind = _TIFF_COLOURS[page.photometric]
    if kind == "white is 0":
        grey = image if image.ndim == 2 else image[..., 0]
        return 65535 - grey
    if kind == "inks":
        # Without a profile: light is what ink lets through, as Pillow has it for 8 bits.
        light = 65535 - image[..., :4].astype(np.uint32)
        return np.asarray((light[..., :3] * light[..., 3:] + 32767) // 65535, dtype=np.uint16)
    return image


def _colour_channels(path: Path, header: ExrHeader) -> list[str]:
    """Return the names of the channels that hold red, green and blue, or of the one that holds grey."""
    names = header.channels
    for last in [name for name in names if name == "R" or name.endswith(".R")]:
        layer = last[:-1]
        if {layer + "G", layer + "B"} <= names.keys():
            return [layer + colour for colour in "RGB"]
    if "Y" in names:
        return ["Y"]
    listed = ", ".join(list(names)[:8])
    raise InputError(
        f"{path}: a guide must have the channels R, G and B, or Y; got {listed or 'none'}",
        "is this the depth file? save the guide as PNG or JPEG",
    )


def _read_exr_guide(path: Path) -> NDArray[np.uint16]:
    header = exr_header(path)
    planes = [plane.astype(np.float32) for plane in exr_pixels(path, header, _colour_channels(path, header))]
    image = np.stack(planes * (3 // len(planes)), axis=-1)
    finite = image[np.isfinite(image)]
    white = max(1.0, float(np.percentile(finite, _EXR_WHITE_PERCENTILE))) if finite.size else 1.0
    light = np.clip(np.nan_to_num(image, nan=0.0, posinf=white, neginf=0.0) / np.float32(white), 0, 1)
    # IEC 61966-2-1: straight near black, a power above.
    curved = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    image16: NDArray[np.uint16] = np.rint(curved * 65535).astype(np.uint16)
    return image16


def _open_heif(path: Path) -> Any:
    try:
        import pillow_heif
    except ImportError:
        raise InputError(
            f"{path}: HEIC pictures must have a decoder; pillow-heif is not installed",
            "pip install 'ddfup[heic]', or save the guide as JPEG",
        ) from None
    return pillow_heif.open_heif(path)


@contextmanager
def _pillow(path: Path) -> Iterator[Any]:
    from PIL import Image, UnidentifiedImageError

    # Pillow's own limit is lower than ours and only warns; ours is checked right after the header.
    with _PILLOW_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            picture = Image.open(path, formats=GUIDE_FORMATS)
        except UnidentifiedImageError:
            kind = _kind(read_start(path))
            if kind != "picture":
                raise InputError(f"{path}: must be a whole {kind} file; its header is cut or damaged", AGAIN) from None
            raise InputError(
                f"{path}: a guide must be a JPEG, PNG, TIFF, WebP, EXR or HEIC picture; its content is none of them",
                "are depth and guide swapped? otherwise save the guide as PNG or JPEG",
            ) from None
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with picture:
        yield picture
