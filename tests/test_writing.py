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


def test_outputs_are_checked_before_work(tmp_path):
    writing.check_writable(tmp_path / "new.png")
    with pytest.raises(OutputError, match="this is a folder"):
        writing.check_writable(tmp_path)
    with pytest.raises(OutputError, match="its folder must exist"):
        writing.check_writable(tmp_path / "none" / "a.png")


def test_pictures(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(writing.encode_image(Path("a.png"), picture))) as image:
        np.testing.assert_array_equal(np.array(image), picture)
    with Image.open(io.BytesIO(writing.encode_image(Path("a.jpg"), picture))) as image:
        assert isinstance(image, Image.Image) and image.format == "JPEG"
    with pytest.raises(ArgumentError, match=r"\.png or \.jpg; got 'a\.gif'"):
        writing.encode_image(Path("a.gif"), picture)
