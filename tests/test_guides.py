"""Guides of renderers and phones, and decoders that must not speak for themselves."""

import io as stdio
import struct
import sys
import types

import numpy as np
import pytest
import tifffile
from depth_files import RAMP, exr, save
from PIL import Image

from ddfup import io
from ddfup.errors import InputError

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def flat(*values: float) -> np.ndarray:
    """One row of grey pixels."""
    return np.repeat(np.array([values], np.float32)[..., None], 3, axis=-1)


def test_exr_light_gets_the_curve_of_srgb(tmp_path):
    # Pairs of linear light and sRGB as the standard's tables give them.
    light = [0.0, 0.0021219, 0.0144438, 0.2140411, 0.5028865, 1.0]
    srgb = np.array([0, 0.0274146, 0.1246, 0.5, 0.7383, 1.0])
    path = save(tmp_path / "g.exr", exr({"RGB": flat(*light)}))
    guide = io.read_guide(path)
    assert guide.dtype == np.uint16 and guide.shape == (1, 6, 3)
    np.testing.assert_allclose(guide[0, :, 1] / 65535, srgb, atol=2e-3)
    assert guide[0, 0, 0] == 0 and guide[0, 3, 0] == pytest.approx(65535 / 2, abs=2) and guide[0, 5, 2] == 65535


def test_exr_light_above_white_is_scaled(tmp_path):
    picture = np.full((20, 20, 3), 2.0, np.float16)
    picture[:10] = 4.0
    picture[0, 0], picture[0, 1], picture[0, 2] = np.inf, np.nan, -3
    guide = io.read_guide(save(tmp_path / "g.exr", exr({"RGB": picture})))
    assert (guide[5] == 65535).all(), "the brightest are white"
    # Half of that light is 0.7354 in sRGB.
    np.testing.assert_allclose(guide[15] / 65535, 0.7354, atol=1e-3)
    assert guide[0, :3, 0].tolist() == [65535, 0, 0]


def test_exr_guide_channels(tmp_path):
    colours = {"R": RAMP / 5, "G": RAMP / 10, "B": RAMP / 20}
    plain = io.read_guide(save(tmp_path / "a.exr", exr({**colours, "A": RAMP, "Z": RAMP})))
    assert (plain[..., 0] > plain[..., 1]).all() and (plain[..., 1] > plain[..., 2]).all()
    layers = {f"View Layer.Combined.{name}": values for name, values in colours.items()}
    np.testing.assert_array_equal(io.read_guide(save(tmp_path / "b.exr", exr(layers))), plain)
    grey = io.read_guide(save(tmp_path / "c.exr", exr({"Y": RAMP / 5})))
    np.testing.assert_array_equal(grey, plain[..., :1].repeat(3, axis=-1))
    header = io.read_guide_header(tmp_path / "a.exr")
    assert (header.width, header.height, header.orientation, header.format) == (4, 3, 1, "EXR")
    with pytest.raises(InputError, match="must have the channels R, G and B, or Y; got Z") as caught:
        io.read_guide(save(tmp_path / "d.exr", exr({"Z": RAMP})))
    assert "is this the depth file?" in caught.value.hint


def test_heic_needs_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(InputError, match="HEIC pictures must have a decoder") as caught:
        io.read_guide(save(tmp_path / "g.heic", HEIC))
    assert "ddfup[heic]" in caught.value.hint


def test_heic_goes_through_its_extra(tmp_path, monkeypatch):
    picture = Image.new("RGBA", (8, 6), (10, 20, 30, 40))
    opened = types.SimpleNamespace(size=(8, 6), to_pillow=lambda: picture)
    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(open_heif=lambda path: opened))
    path = save(tmp_path / "g.heic", HEIC)
    header = io.read_guide_header(path)
    assert (header.width, header.height, header.format) == (8, 6, "HEIC")
    np.testing.assert_array_equal(io.read_guide(path), np.full((6, 8, 3), [10, 20, 30], np.uint8))
    with pytest.raises(InputError, match="at most 47 pixels; got 8x6"):
        io.read_guide(path, max_pixels=47)


def test_real_heic(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="ddfup[heic] is not installed")
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32] = [200, 40, 40]
    heif.from_pillow(Image.fromarray(picture)).save(tmp_path / "g.heic", quality=95)
    assert np.abs(io.read_guide(tmp_path / "g.heic").astype(int) - picture).mean() < 5
    path = save(tmp_path / "cut.heic", (tmp_path / "g.heic").read_bytes()[:200])
    with pytest.raises(InputError):
        io.read_guide(path)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_format_is_known_by_content(tmp_path, name):
    buffer = stdio.BytesIO()
    Image.new("RGB", (4, 3)).save(buffer, name)
    assert io.read_guide_header(save(tmp_path / "g.xyz", buffer.getvalue())).format == name


@pytest.mark.parametrize("how", ["lossy", "lossless", "extended"])
def test_a_huge_webp_is_refused_before_pillow_makes_its_canvas(tmp_path, monkeypatch, how):
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (23, 37, 4 if how == "extended" else 3), np.uint8)
    )
    buffer = stdio.BytesIO()
    image.save(buffer, "WEBP", lossless=how == "lossless")
    data = bytearray(buffer.getvalue())
    # It is as expected of a sound file.
    assert bytes(data[12:16]) == {"lossy": b"VP8 ", "lossless": b"VP8L", "extended": b"VP8X"}[how]
    header = io.read_guide_header(save(tmp_path / "g.webp", bytes(data)))
    assert (header.width, header.height) == (37, 23)
    if how == "lossy":
        data[26:30] = struct.pack("<HH", 16383, 16382)
    elif how == "lossless":
        data[21:25] = struct.pack("<I", 16382 | 16381 << 14)
    else:
        data[24:30] = (16382).to_bytes(3, "little") + (16381).to_bytes(3, "little")
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("opened by Pillow"))
    with pytest.raises(InputError, match=r"must have at most 200000000 pixels; got 16383x16382"):
        io.read_guide_header(save(tmp_path / "huge.webp", bytes(data)))
    with pytest.raises(InputError, match="must not shrink more than"):
        io.read_guide_header(save(tmp_path / "huge.webp", bytes(data)), max_pixels=10**9)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint32])
def test_tiff_of_more_than_16_bits_is_no_guide(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "g.tif", np.zeros((4, 5, 3), dtype), photometric="rgb")
    with pytest.raises(InputError, match=f"a guide must have 8 or 16 bits per channel; got {np.dtype(dtype)}"):
        io.read_guide(tmp_path / "g.tif")


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiff_inks_of_16_bits_are_what_pillow_makes_of_8(tmp_path, planar):
    inks = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(inks, "CMYK").convert("RGB"))
    stored = inks.astype(np.uint16) * 257
    stored = np.moveaxis(stored, -1, 0) if planar == "separate" else stored
    tifffile.imwrite(tmp_path / "g.tif", stored, photometric="separated", planarconfig=planar)
    guide = io.read_guide(tmp_path / "g.tif")
    assert guide.dtype == np.uint16
    np.testing.assert_allclose(guide / 257, expected, atol=1)


def test_tiff_with_white_as_0(tmp_path):
    values = np.arange(20, dtype=np.uint16).reshape(4, 5) * 3000
    tifffile.imwrite(tmp_path / "g.tif", values, photometric="miniswhite")
    np.testing.assert_array_equal(io.read_guide(tmp_path / "g.tif")[..., 1], 65535 - values)


def test_tiff_of_other_colours_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "g.tif", np.zeros((4, 5, 3), np.uint16), photometric="cielab")
    with pytest.raises(InputError, match="a guide of 16 bits must be grey, RGB or CMYK; got CIELAB"):
        io.read_guide(tmp_path / "g.tif")


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_damaged_tiff_guides_are_reported_once(tmp_path, capfd, compression):
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    buffer = stdio.BytesIO()
    Image.fromarray(noise).save(buffer, "TIFF", compression=compression)
    data = bytearray(buffer.getvalue())
    data[200:3000] = bytes(2800)
    with pytest.raises(InputError, match="must be a whole"):
        io.read_guide(save(tmp_path / "g.tif", bytes(data)))
    assert capfd.readouterr() == ("", "")
