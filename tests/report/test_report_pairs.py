"""What belongs together in a report, and what is said about the rest."""

import pytest

from ddfup.errors import InputError, PairingError
from ddfup.report import find_samples


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_folders_pair_by_relative_stem_whatever_the_suffix(tmp_path):
    touch(*(tmp_path / "pred" / each for each in ("a/x.png", "b/x.npy", "v1.2.tiff", "alone.png", "notes.txt")))
    touch(*(tmp_path / "gt" / each for each in ("a/x.npy", "b/x.npy", "v1.2.png", "x.png", "y.png", "z.png", "w.png")))
    touch(tmp_path / "guides" / "a" / "x.JPG", tmp_path / "low" / "v1.2.png")
    found = find_samples(tmp_path / "pred", tmp_path / "gt", guides=tmp_path / "guides", inputs=tmp_path / "low")
    assert [(s.name, s.prediction.suffix, s.truth.suffix) for s in found.samples] == [
        ("a/x", ".png", ".npy"),
        ("b/x", ".npy", ".npy"),
        ("v1.2", ".tiff", ".png"),
    ]
    assert [s.guide and s.guide.name for s in found.samples] == ["x.JPG", None, None]
    assert [s.low and s.low.name for s in found.samples] == [None, None, "v1.2.png"]
    assert found.notes == [
        f"1 of {tmp_path / 'pred'} without partner left out: alone",
        f"4 of {tmp_path / 'gt'} without partner left out: w, x, y, ...",
        f"2 of 3 without guide in {tmp_path / 'guides'}",
        f"2 of 3 without input in {tmp_path / 'low'}",
    ]


def test_two_files_need_no_common_name(tmp_path):
    files = [tmp_path / name for name in ("pred_up.png", "gt.npy", "photo.jpg", "low.png", "masks/gt.png")]
    touch(*files)
    found = find_samples(files[0], files[1], guides=files[2], inputs=files[3], masks=tmp_path / "masks")
    (sample,) = found.samples
    assert [sample.prediction, sample.truth, sample.guide, sample.low, sample.mask] == files
    assert sample.name == "pred_up"


def test_hidden_files_and_the_report_itself_are_not_searched(tmp_path):
    touch(*(tmp_path / side / "x.png" for side in ("pred", "gt")))
    touch(
        *(tmp_path / side / folder / "y.png" for side in ("pred", "gt") for folder in (".hidden", "out/report_images"))
    )
    found = find_samples(tmp_path / "pred", tmp_path / "gt", leave_out=tmp_path / "pred" / "out")
    assert [sample.name for sample in found.samples] == ["x"]
    (tmp_path / "pred" / "loop").symlink_to(tmp_path / "pred")
    assert len(find_samples(tmp_path / "pred", tmp_path / "gt").samples) == 2


def test_what_does_not_pair_is_refused(tmp_path):
    touch(
        tmp_path / "pred" / "x.png", tmp_path / "gt" / "y.png", tmp_path / "two" / "x.png", tmp_path / "two" / "x.npy"
    )
    with pytest.raises(PairingError, match=r"no depth file in .*pred \(1 files\) has the relative stem of one in"):
        find_samples(tmp_path / "pred", tmp_path / "gt")
    with pytest.raises(PairingError, match=r"relative stems must be unique; got .*x\.npy and .*x\.png"):
        find_samples(tmp_path / "pred", tmp_path / "two")
    with pytest.raises(PairingError, match="two files or two folders"):
        find_samples(tmp_path / "pred" / "x.png", tmp_path / "gt")
    with pytest.raises(InputError, match="nowhere: must exist; it does not"):
        find_samples(tmp_path / "pred", tmp_path / "nowhere")
    with pytest.raises(PairingError, match="must hold a mask for each pair; none for x"):
        find_samples(tmp_path / "pred", tmp_path / "pred", masks=tmp_path / "gt")
    touch(tmp_path / "pred" / "z.png")
    with pytest.raises(PairingError, match="must be a folder for 2 pairs; it is a file"):
        find_samples(tmp_path / "pred", tmp_path / "pred", guides=tmp_path / "gt" / "y.png")
