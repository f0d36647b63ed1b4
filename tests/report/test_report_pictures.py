"""The pictures of a report: one scale for all depth, grey where nothing is, thumbnails that keep to their size."""

import io

import numpy as np
import pytest
from depth_folders import prediction, truth, write_folders
from PIL import Image

from ddfup import cli
from ddfup.report import run
from ddfup.report.pictures import paint


def painted(guess, true, *, most=20_000, side=480, **extras):
    options = {"guide": None, "low": None, "label": "m", **extras}
    return paint(guess, true, thumbnail_bytes=most, thumbnail_side=side, **options)


def decoded(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB")).astype(int)


def test_equal_depth_has_equal_colours_in_every_picture():
    true = truth(0)
    pictures = painted(true.copy(), true, low=true[3::8, 3::8])
    assert np.array_equal(decoded(pictures.shown["result"].full), decoded(pictures.shown["truth"].full))
    # The input is stored without loss, JPEG is close to it.
    inner = decoded(pictures.shown["input"].full)[5, 1] - decoded(pictures.shown["truth"].full)[5 * 8 + 3, 1 * 8 + 3]
    assert abs(inner).max() <= 6
    low, high = np.percentile(true, (2, 98))
    assert pictures.depth[0] <= low + 1e-3 and pictures.depth[1] >= high - 1e-3


def test_what_is_not_measured_is_grey_and_errors_end_at_their_98th_percentile():
    true, guess = truth(0), prediction(truth(0), 0, 0.05)
    true[:16, :16] = np.nan
    pictures = painted(guess, true)
    for kind in ("truth", "error"):
        patch = decoded(pictures.shown[kind].full)[4:12, 4:12].reshape(-1, 3)
        assert (np.ptp(patch, axis=1) <= 12).all(), kind
    assert pictures.error == pytest.approx(np.nanpercentile(np.abs(guess - true), 98))


def test_guides_of_16_bits_are_shown():
    guide = np.full((60, 80, 3), 40_000, np.uint16)
    shown = painted(truth(0), truth(0), guide=guide).shown["guide"]
    assert abs(decoded(shown.full) - 40_000 // 256).max() <= 2


@pytest.mark.parametrize("most", [20_000, 3_000, 600])
def test_thumbnails_keep_to_their_size(most):
    rng = np.random.default_rng(0)
    noise = rng.uniform(1, 5, (480, 640)).astype(np.float32)
    for shown in painted(noise, noise[::-1], most=most).shown.values():
        assert len(shown.thumbnail) <= most
        assert (shown.width, shown.height) == (640, 480)
    smooth = painted(truth(0), truth(0), most=most).shown["result"]
    assert decoded(smooth.thumbnail).shape[1] <= 80


def test_a_page_without_room_for_thumbnails_takes_the_files(tmp_path, capsys, monkeypatch):
    write_folders(tmp_path, ["a", "b"])
    monkeypatch.setattr(run, "_THUMBNAILS_BYTES", 100)
    assert cli.main(["report", str(tmp_path / "pred"), str(tmp_path / "gt"), "-o", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/webp" not in page
    assert page.count('src="report_images/') == page.count('loading="lazy"') == 6
