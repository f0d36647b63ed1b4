"""Files are written whole or not at all, and what cannot be written is refused before any work."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddfup import writing
from ddfup.errors import ArgumentError, OutputError


def test_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old and longer")
    writing.write_files({path: b"new"})
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_written_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_bytes(b"")
    writing.write_files({tmp_path / "ours": b""})
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("failing", ["fsync", "write"])
def test_nothing_is_left_of_a_failed_write(tmp_path, monkeypatch, failing):
    old = tmp_path / "a.bin"
    old.write_bytes(b"old")

    def no_space(*args: object) -> None:
        raise OSError(28, "No space left on device")

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", no_space)
        files = {old: b"new"}
    else:
        files = {old: b"new", tmp_path / "missing" / "b.bin": b"new"}
    with pytest.raises(OutputError, match="must be writable"):
        writing.write_files(files)
    assert old.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_a_folder_in_the_way_of_one_file_leaves_all_others_as_they_were(tmp_path):
    old, folder = tmp_path / "a.png", tmp_path / "b.png"
    old.write_bytes(b"old")
    folder.mkdir()
    with pytest.raises(OutputError, match=r"b\.png: must be writable .* Is a directory"):
        writing.write_files({old: b"new", folder: b"new"})
    assert old.read_bytes() == b"old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("kind", ["file", "link", "link to nowhere"])
def test_what_exists_is_refused(tmp_path, kind):
    path = tmp_path / "out.png"
    writing.refuse_existing(path, overwrite=False)
    (tmp_path / "other").write_bytes(b"")
    if kind == "file":
        path.write_bytes(b"")
    else:
        path.symlink_to(tmp_path / ("other" if kind == "link" else "nowhere"))
    with pytest.raises(OutputError, match="must not exist yet; it does"):
        writing.refuse_existing(path, overwrite=False)
    writing.refuse_existing(path, overwrite=True)


def test_outputs_are_checked_before_work(tmp_path):
    writing.check_writable(tmp_path / "new.png")
    with pytest.raises(OutputError, match="this is a folder"):
        writing.check_writable(tmp_path)
    with pytest.raises(OutputError, match="its folder must exist"):
        writing.check_writable(tmp_path / "none" / "a.png")


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    for check in (writing.check_writable, writing.refuse_folder):
        with pytest.raises(OutputError, match=r"a\.png: an output must have a name .* File name too long"):
            check(tmp_path / ("a" * 300 + ".png"))
    writing.refuse_folder(tmp_path / "none" / "a.png")


def test_a_folder_that_stays_empty_is_not_left(tmp_path):
    new = tmp_path / "a" / "b"
    with pytest.raises(RuntimeError), writing.output_folder(new):
        assert new.is_dir()
        raise RuntimeError
    assert not new.parent.exists()
    with writing.output_folder(new):
        (new / "file").write_bytes(b"")
    assert (new / "file").is_file()
    (new / "file").unlink()
    with writing.output_folder(new):
        pass
    assert new.is_dir(), "it was there before"
    (new / "file").write_bytes(b"")
    for place in (new / "file", new / "file" / "below", tmp_path / "made" / ("a" * 300)):
        with pytest.raises(OutputError, match="must be a folder or become one"), writing.output_folder(place):
            pass
    assert not (tmp_path / "made").exists()


def test_pictures(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(writing.encode_image(Path("a.png"), picture))) as image:
        np.testing.assert_array_equal(np.array(image), picture)
    with Image.open(io.BytesIO(writing.encode_image(Path("a.jpg"), picture))) as image:
        assert isinstance(image, Image.Image) and image.format == "JPEG"
    with pytest.raises(ArgumentError, match=r"\.png or \.jpg; got 'a\.gif'"):
        writing.encode_image(Path("a.gif"), picture)
