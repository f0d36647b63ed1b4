"""The rooms rendered for training: things and textures, and depth against the places where rays meet walls."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import render_rooms
    import room_things

    return render_rooms, room_things


@pytest.mark.parametrize("seed", range(60))
def test_things_are_whole_meshes_of_about_unit_size(examples, seed):
    _, room_things = examples
    meshes = room_things.thing(np.random.default_rng(seed))
    assert meshes
    for mesh in meshes:
        assert mesh.faces.min() == 0 and mesh.faces.max() == len(mesh.vertices) - 1
        assert len(mesh.uv) == len(mesh.vertices) and mesh.uv.shape[1] == 2 and mesh.vertices.shape[1] == 3
        assert np.isfinite(mesh.vertices).all() and np.isfinite(mesh.uv).all()
    size = np.ptp(np.concatenate([mesh.vertices for mesh in meshes]), axis=0)
    assert 0.2 < size.max() < 2.5


def test_a_box_has_its_sides(examples):
    _, room_things = examples
    mesh = room_things.box(1, 2, 3)
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    assert np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2 == pytest.approx(2 * (1 * 2 + 2 * 3 + 1 * 3))
    np.testing.assert_allclose(np.abs(mesh.vertices), np.broadcast_to([0.5, 1, 1.5], mesh.vertices.shape))


@pytest.mark.parametrize("upright", [False, True])
def test_rotations(examples, upright):
    _, room_things = examples
    rng = np.random.default_rng(0)
    turns = np.array([room_things.rotation(rng, upright=upright) for _ in range(500)])
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), turns.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turns), 1)
    if upright:
        np.testing.assert_allclose(turns[:, 1], np.broadcast_to([0, 1, 0], (500, 3)), atol=1e-12)
    # No direction is preferred.
    np.testing.assert_allclose(turns[:, 0].mean(axis=0), 0, atol=0.15)


def test_textures(examples, tmp_path):
    _, room_things = examples
    cv2.imwrite(str(tmp_path / "red.png"), np.full((200, 300, 3), (0, 0, 255), np.uint8))
    textures = room_things.Textures(sorted(tmp_path.iterdir()))
    rng = np.random.default_rng(1)
    tiles = [textures.tile(rng, 128, 1.5) for _ in range(40)]
    for tile in tiles:
        assert tile.shape == (128, 128, 3) and tile.min() >= 0 and tile.max() <= 1 + 1e-6
    red = sum(np.allclose(tile, (1, 0, 0)) for tile in tiles)
    assert 10 < red < 30
    # Mirrored: the pieces meet without a seam.
    steep = np.repeat(np.linspace(0, 1, 200)[:, None, None], 3, axis=2) * np.ones((1, 200, 1))
    textures.draw = lambda rng: steep
    assert np.abs(np.diff(textures.tile(rng, 256, 4), axis=0)).max() < 0.05


def test_depth_is_that_of_the_walls(examples, monkeypatch):
    mi = pytest.importorskip("mitsuba")
    render_rooms, room_things = examples
    mi.set_variant("scalar_rgb")
    width, height = 48, 36
    for name, value in (("WIDTH", width), ("HEIGHT", height), ("LIGHT_RAYS", 4)):
        monkeypatch.setattr(render_rooms, name, value)
    monkeypatch.setattr(render_rooms, "thing", lambda rng: [])
    sky = {"type": "constant", "radiance": {"type": "rgb", "value": [1.0, 1.0, 1.0]}}
    monkeypatch.setattr(render_rooms, "lights", lambda rng, room: {"sky": sky})  # lamps would be in sight
    textures = room_things.Textures([])
    for number in range(4):
        picture, metres = render_rooms.render(mi, number, textures)
        assert picture.shape == (height, width, 3) and picture.dtype == np.uint8 and picture.std() > 1
        rng = np.random.default_rng([render_rooms.SEED, number])
        view = render_rooms.look_around(rng)
        room = render_rooms.furnish(render_rooms.Atlas(rng, textures), rng, view)
        # Rays through pixel centres, cut with the planes of the room.
        x, y = np.meshgrid(np.arange(width) + 0.5 - width / 2, height / 2 - np.arange(height) - 0.5)
        rays = view.focal * view.forward + x[..., None] * view.right + y[..., None] * view.up
        walls = np.where(rays > 0, room[1], room[0])
        expected = view.focal * (walls / rays).min(axis=-1)
        error = np.abs(metres / expected - 1)
        # All but the pixels along the room's edges, which are means.
        assert np.median(error) < 2e-3 and (error < 0.05).mean() > 0.95


def test_what_is_there_is_kept(tmp_path):
    pytest.importorskip("mitsuba")
    for kind, name in (("rgb", "0007.jpg"), ("depth", "0007.png")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_bytes(b"mine")
    command = [sys.executable, EXAMPLES / "render_rooms.py", tmp_path, "--first", "7", "--count", "1"]
    done = subprocess.run(
        [*command, "--variant", "scalar_rgb"], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == ""
    assert (tmp_path / "rgb" / "0007.jpg").read_bytes() == b"mine"
