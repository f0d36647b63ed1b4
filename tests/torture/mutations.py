"""Valid files, and how they are spoilt: bytes, numbers, cuts, splices; checksums are made right again."""

import io as stdio
import json
import random
import re
import struct
import zipfile
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from depth_files import exr, npy, npz, pfm
from PIL import Image

_ROWS = np.arange(1, 601, dtype=np.float32).reshape(20, 30) / 10
_WHOLE = (_ROWS * 1000).astype(np.uint16)
_PICTURE = np.random.default_rng(1).integers(0, 255, (24, 36, 3), dtype=np.uint8)
_CURSED = [b"\0", b"\xff", b"\x7f", b"\x80", b"\0" * 4, b"\xff" * 4]
_CURSED += [b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\x7f\xff\xff\xff"]
_NUMBERS = b"0 -1 1e999 nan 99999999999999999999 200000 4294967296 0.5 -0 1e-320".split()
_WORDS = [b'"', b"{", b"[" * 60, b",", b"\n", b"\r\n", b"null", b"true", b'""', b"..", b"/", b"\\u0000"]
_WORDS += [b"\xef\xbb\xbf", b"\xed\xa0\x80"]


def pillow(kind, array=_PICTURE, mode=None, **options):
    buffer = stdio.BytesIO()
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(array, **options):
    buffer = stdio.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def depth_seeds():
    """Valid depth files by format."""
    kinds = ("NO", "RLE", "ZIPS", "ZIP", "PIZ", "PXR24", "B44")
    return {
        "png": [pillow("PNG", _WHOLE), pillow("PNG", _WHOLE.astype(np.uint8)), imagecodecs.png_encode(_WHOLE)],
        "tiff": [
            tiff(_ROWS, compression="zlib", predictor=True),
            tiff(_ROWS, compression="lzw"),
            tiff(_ROWS, compression="zstd"),
            tiff(_WHOLE, tile=(16, 16)),
            tiff(_ROWS, byteorder=">"),
            tiff(_ROWS, bigtiff=True, rowsperstrip=3),
            tiff(_ROWS, extratags=[(42113, "s", 0, "-9999", True)]),
        ],
        "exr": [
            *(exr({"Z": _ROWS}, compression=kind) for kind in kinds),
            exr({"RGB": np.stack([_ROWS] * 3, -1)}, tiled=True),
        ],
        "pfm": [pfm(_ROWS), pfm(_ROWS, scale=2.5)],
        "npy": [npy(_ROWS), npy(np.asfortranarray(_WHOLE)), npy(_ROWS.astype(">f8"))],
        "npz": [npz(depth=_ROWS), npz(compressed=False, depth=_ROWS), npz(a=_WHOLE)],
        "depth": [imagecodecs.lzfse_encode(_ROWS.tobytes()), _ROWS.tobytes(), _ROWS.astype("<f2").tobytes()],
    }


def guide_seeds():
    """Valid guides by format."""
    exif = Image.Exif()
    exif[274] = 6
    deep = _PICTURE.astype(np.uint16) * 257
    return {
        "jpg": [
            pillow("JPEG", quality=80, exif=exif),
            pillow("JPEG", mode="CMYK"),
            pillow("JPEG", mode="L", progressive=True),
            pillow("JPEG", subsampling=2, optimize=True),
        ],
        "png": [
            pillow("PNG"),
            pillow("PNG", mode="P"),
            pillow("PNG", mode="RGBA", exif=exif),
            imagecodecs.png_encode(deep),
        ],
        "tif": [
            pillow("TIFF", compression="tiff_lzw"),
            pillow("TIFF", compression="jpeg"),
            pillow("TIFF", mode="CMYK"),
            tiff(deep, compression="zlib", photometric="rgb"),
            tiff(np.moveaxis(deep, -1, 0), planarconfig="separate", photometric="rgb"),
        ],
        "webp": [pillow("WEBP"), pillow("WEBP", lossless=True, exif=exif), pillow("WEBP", mode="RGBA")],
        "exr": [
            exr({"RGB": (_PICTURE / 255).astype(np.float32)}),
            exr({"RGB": (_PICTURE / 255).astype(np.float16)}, tiled=True),
        ],
    }


def text_seeds():
    """Valid lists, settings and states by target."""
    rows = [{"depth": "a.png", "guide": "b.jpg", "out": "x/y.png"}, {"depth": "c,d.npy", "guide": 'e"f.jpg'}]
    journal = [
        {"out": "a.png", "key": "k", "sha256": "s", "valid_fraction": 0.5},
        {"out": "b", "key": "k", "error": "e"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    toml = 'precision = "bf16"\ninvalid = [0, 1001]\noverwrite = true\nmax-pixels = 768\n'
    toml += "[upsample]\ntile = 512\n[demo]\ntile = 1\n"
    return {
        "csv": [b'depth,guide,out\na.png,b.jpg,x/y.png\n"c,d.npy",e.jpg,\n', b"depth,guide\na,b\n"],
        "jsonl": [lines.encode(), b"\n" + lines.encode()],
        "toml": [toml.encode(), b"unit = 'tum'\nfill = true\n[batch]\nworkers = 2\n"],
        "camera": [b'{"fx": 30, "fy": 30, "cx": 17.5, "cy": 11.5}', b'{"K": [[30,0,1],[0,30,2],[0,0,1]], "width": 36}'],
        "journal": ["".join(f"\n{json.dumps(row)}\n" for row in journal).encode()],
    }


# --- spoiling ---


def mutate(data, others, generator: random.Random):
    """Spoil a valid file in one to five ways; often its checksums are right again."""
    content = bytearray(data)
    text = _is_text(data)
    for _ in range(generator.choice((1, 1, 1, 2, 2, 3, 5))):
        if not content:
            break
        ways = (_bits, _bytes, _cursed, _cut, _copy, _drop, _splice, _number) + (
            (_number, _number, _word) if text else ()
        )
        generator.choice(ways)(content, others, generator)
    if generator.random() < 0.6:
        return repair(bytes(content))
    return bytes(content)


def _is_text(data):
    return not data[:64].translate(None, bytes(range(32, 127)) + b"\r\n\t")


def _place(content, generator):
    # Headers are where most is decided.
    most = len(content) if generator.random() < 0.5 else min(len(content), 256)
    return generator.randrange(most)


def _bits(content, others, generator):
    content[_place(content, generator)] ^= 1 << generator.randrange(8)


def _bytes(content, others, generator):
    content[_place(content, generator)] = generator.randrange(256)


def _cursed(content, others, generator):
    at, new = _place(content, generator), generator.choice(_CURSED)
    content[at : at + len(new) * generator.randrange(2)] = new


def _cut(content, others, generator):
    del content[int(generator.random() ** 0.3 * len(content)) :]


def _copy(content, others, generator):
    at, length = _place(content, generator), generator.choice((1, 2, 4, 8, 16, 64, 300))
    to = _place(content, generator)
    content[to:to] = content[at : at + length]


def _drop(content, others, generator):
    at = _place(content, generator)
    del content[at : at + generator.choice((1, 2, 4, 12, 100))]


def _splice(content, others, generator):
    other = generator.choice(others)
    at = _place(content, generator)
    content[at:] = other[min(at, len(other)) :]


def _number(content, others, generator):
    """Change a number: in text as text, else as bytes of either order."""
    found = list(re.finditer(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", bytes(content[:4096])))
    if found and generator.random() < 0.7:
        where = generator.choice(found)
        content[where.start() : where.end()] = generator.choice(_NUMBERS)
        return
    at, order = _place(content, generator), generator.choice("<>")
    value = generator.choice((0, 1, 3, 255, 256, 14000, 65535, 65536, 200000, 1 << 28, (1 << 31) - 1, (1 << 32) - 1))
    kind = generator.choice("IH")
    content[at : at + struct.calcsize(kind)] = struct.pack(
        order + kind, value & (0xFFFF if kind == "H" else 0xFFFFFFFF)
    )


def _word(content, others, generator):
    at = _place(content, generator)
    content[at:at] = generator.choice(_WORDS)


def repair(data):
    """Make checksums and lengths right, as far as the file can still be parsed."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _repair_png(data)
    if data.startswith(b"PK\3\4"):
        return _repair_zip(data)
    return data


def _repair_png(data):
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + min(length, len(data) - at - 12)]
        parts.append(struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + len(body) - 4
    if b"IEND" not in parts[-1]:
        parts.append(b"\0\0\0\0IEND\xae\x42\x60\x82")
    return b"".join(parts)


def _repair_zip(data):
    """Pack again what the members hold, whatever it is."""
    try:
        with zipfile.ZipFile(stdio.BytesIO(data)) as archive:
            names = [info.filename for info in archive.infolist()]
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error, OverflowError):
        return data
    at = data.find(b"\x93NUMPY")
    body = data[at:] if at >= 0 else data
    buffer = stdio.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name or "x.npy", body)
    return buffer.getvalue()


def weights_seed(folder: Path):
    """A small network's weight file, valid."""
    from networks import tiny_pyramid

    from ddfup import models

    path = folder / "seed.safetensors"
    models.save_weights(path, tiny_pyramid(), architecture="pyramid", name="seed", description="tried")
    return path.read_bytes()


def mutate_weights(data, others, generator: random.Random):
    """Spoil a weight file: half of the time its header's texts and numbers alone, its length made right."""
    if generator.random() < 0.4:
        return mutate(data, others, generator)
    length = int.from_bytes(data[:8], "little")
    header = bytearray(data[8 : 8 + length])
    for _ in range(generator.choice((1, 1, 2, 3))):
        generator.choice((_number, _number, _word, _bits, _drop, _copy))(header, others, generator)
    return len(header).to_bytes(8, "little") + bytes(header) + data[8 + length :]
