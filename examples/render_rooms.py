"""Renders rooms full of things, with exact depth, as training data: a folder with rgb/ and depth/ of equal stems.

    pip install '.[render]'
    python examples/render_rooms.py datasets/rooms --count 400 --textures datasets/nyu_train/rgb --last 899

Shapes and textures are in ``room_things.py``; Mitsuba traces the light. Frame ``i`` depends on ``i`` and the textures
alone: what is there already is kept, and several processes may share a folder (``--first``). Some five seconds a frame
and core with Mitsuba's LLVM variant, which needs the LLVM library (DRJIT_LIBLLVM_PATH says where, if it is not found).

Depth is what an image of depth is: the mean over a pixel's area, of depth or, in three rooms of five, of its inverse.
One exact value per pixel would be sharper than any sensor's map or resized one, and so would results be of networks
trained on it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
from numpy.typing import NDArray
from room_things import Array, Mesh, Rng, Textures, merge, placed, rotation, thing

from ddfup.writing import encode_image, write_files

WIDTH, HEIGHT = 480, 360
# Rays per pixel: for light, and for depth along each axis.
LIGHT_RAYS, DEPTH_RAYS = 32, 4
SEED = 78


class View(NamedTuple):
    """A camera at the origin: unit vectors forward, right and up, and its focal length in pixels."""

    forward: Array
    right: Array
    up: Array
    focal: float


class Atlas:
    """All things of a room as two meshes, matt and glossy, with one texture.

    Mitsuba compiles a program for each kind of scene, in a quarter of a minute; so all rooms are of one kind.
    """

    CELL, GRID = 256, 12
    # The first cells, two by two, are the walls'.
    WALLS = 5

    def __init__(self, rng: Rng, textures: Textures) -> None:
        self._rng, self._textures = rng, textures
        self._image = np.zeros((self.GRID * self.CELL, self.GRID * self.CELL, 3), np.float32)
        self._walls = [(0, 2 * k) for k in range(self.WALLS)]
        taken = {(row, column) for row in range(2) for column in range(2 * self.WALLS)}
        cells = [(row, column) for row in range(self.GRID) for column in range(self.GRID)]
        self._free = [cell for cell in cells if cell not in taken]
        self._used: list[tuple[int, int]] = []
        self._meshes: tuple[list[Mesh], list[Mesh]] = ([], [])

    def add(self, mesh: Mesh, *, wall: bool = False) -> None:
        """Give a mesh a texture of its own; when there is no room for more, one of those there are."""
        span = 2 if wall else 1
        places = self._walls if wall else self._free
        if places:
            cell = places.pop(int(self._rng.integers(len(places))))
            self._used += [] if wall else [cell]
            side, (top, left) = span * self.CELL, (self.CELL * k for k in cell)
            tile = self._textures.tile(self._rng, side, span * self._rng.uniform(0.4, 2.5))
            self._image[top : top + side, left : left + side] = tile
        else:
            cell = self._used[int(self._rng.integers(len(self._used)))]
        uv = mesh.uv - mesh.uv.min(axis=0)
        # Away from the neighbours' pixels.
        uv = span * (0.02 + 0.96 * uv / max(uv.max(), 1e-6))
        uv = (uv + cell[::-1]) / self.GRID
        self._meshes[int(self._rng.uniform() < 0.3)].append(mesh._replace(uv=uv))

    def build(self, mi: Any) -> dict[str, Any]:
        """Return the meshes as Mitsuba has them."""
        bitmap = {"type": "bitmap", "bitmap": mi.Bitmap(self._image), "raw": True}
        gloss = float(self._rng.uniform(0.05, 0.4))
        surfaces = (
            {"type": "diffuse", "reflectance": bitmap},
            {"type": "roughplastic", "diffuse_reflectance": bitmap, "alpha": gloss},
        )
        # Out of sight, since a mesh must not be empty.
        nothing = Mesh(np.eye(3) - (0, 0, 100), np.array([[0, 1, 2]]), np.zeros((3, 2)))
        built = {}
        for name, meshes, surface in zip(("matt", "glossy"), self._meshes, surfaces, strict=True):
            whole = merge(meshes or [nothing])
            properties = mi.Properties()
            properties["bsdf"] = mi.load_dict({"type": "twosided", "nested": surface})
            mesh = mi.Mesh(
                name,
                len(whole.vertices),
                len(whole.faces),
                props=properties,
                has_vertex_normals=True,
                has_vertex_texcoords=True,
            )
            parameters = mi.traverse(mesh)
            parameters["vertex_positions"] = np.ravel(whole.vertices).astype(np.float32)
            parameters["vertex_texcoords"] = np.ravel(whole.uv).astype(np.float32)
            parameters["faces"] = np.ravel(whole.faces).astype(np.uint32)
            parameters.update()
            mesh.recompute_vertex_normals()
            built[name] = mesh
        return built


def look_around(rng: Rng) -> View:
    """A camera that looks level or down a little."""
    angles = np.radians([rng.uniform(-5, 25), rng.uniform(-40, 40), rng.normal(0, 4)])
    (pitch_cos, yaw_cos, roll_cos), (pitch_sin, yaw_sin, roll_sin) = np.cos(angles), np.sin(angles)
    forward = np.array([yaw_sin * pitch_cos, -pitch_sin, yaw_cos * pitch_cos])
    right = np.cross(forward, [0, 1, 0])
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    focal = WIDTH / 2 / math.tan(math.radians(rng.uniform(40, 70) / 2))
    return View(forward, roll_cos * right - roll_sin * up, roll_cos * up + roll_sin * right, focal)


def furnish(atlas: Atlas, rng: Rng, view: View) -> Array:
    """Put walls and things into a room, metres; y up, the camera at the origin.

    Returns:
        (2, 3), the corners of the room. The side behind the camera is open, where the sky's light comes in.
    """
    far = rng.uniform(1.6, 5)
    half, floor, ceiling = far * rng.uniform(0.5, 1.2), -far * rng.uniform(0.25, 0.6), far * rng.uniform(0.5, 1)
    room = np.array([[-half, floor, -1], [half, ceiling, far]])
    for axis, end in ((1, 0), (1, 1), (2, 1), (0, 0), (0, 1)):
        corners = np.insert(np.array([[0, 0], [1, 0], [1, 1], [0, 1]]), axis, end, axis=1)
        wall = np.where(corners == 0, room[0], room[1])
        uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1.0]])
        atlas.add(Mesh(wall, np.array([[0, 1, 2], [0, 2, 3]]), uv), wall=True)

    near = rng.uniform(0.35, 0.7) * min(1, far / 3)
    for _ in range(rng.integers(15, 70)):
        meshes = thing(rng)
        z = near * (far / near) ** rng.uniform() if rng.uniform() < 0.6 else rng.uniform(near, far)
        x, y = z / view.focal * rng.uniform(-0.55, 0.55, 2) * (WIDTH, HEIGHT)
        place = z * view.forward + x * view.right + y * view.up
        size = z**0.7 * 0.06 * (0.5 / 0.06) ** rng.uniform()
        resting = rng.uniform() < 0.55
        turn = rotation(rng, upright=resting and rng.uniform() < 0.8)
        if resting and y < 0.1:
            # On the floor; all else floats.
            place[1] = floor - min(((mesh.vertices * size @ turn.T)[:, 1].min() for mesh in meshes), default=0)
        place = np.clip(place, *room)
        if np.linalg.norm(place) > 0.8 * near + 0.6 * size:
            for mesh in meshes:
                atlas.add(placed(mesh, turn, place, size))
    return room


def lights(rng: Rng, room: Array) -> dict[str, Any]:
    """Dim light from everywhere, and one to three lamps; those that are off are there, too (see `Atlas`)."""
    sky = rng.uniform(0.4, 1.5) * (1 + rng.normal(0, 0.15, 3)).clip(0.5)
    found: dict[str, Any] = {"sky": {"type": "constant", "radiance": {"type": "rgb", "value": sky.tolist()}}}
    for k in range(3):
        x, y, z = rng.uniform(0.8 * room[0], 0.8 * room[1])
        place = np.array([x, max(y, 0.2 * room[1, 1]), z])
        on = k == 0 or rng.uniform() < 0.6
        # Never about the camera.
        radius = min(rng.uniform(0.15, 0.7), 0.5 * np.linalg.norm(place))
        light = on * rng.uniform(2, 9) * room[1, 2] ** 2 / 160 / radius**2 * (1 + rng.normal(0, 0.2, 3)).clip(0.4, 2)
        found[f"lamp {k}"] = {
            "type": "sphere",
            "center": place.tolist(),
            "radius": float(radius),
            "emitter": {"type": "area", "radiance": {"type": "rgb", "value": light.tolist()}},
        }
    return found


def camera(mi: Any, view: View, scale: int, rays: int, film: dict[str, Any]) -> Any:
    """The camera, with pictures of ``scale`` times the size."""
    return mi.load_dict(
        {
            "type": "perspective",
            "fov": 2 * math.degrees(math.atan(WIDTH / 2 / view.focal)),
            "fov_axis": "x",
            "near_clip": 0.01,
            "far_clip": 100.0,
            "to_world": mi.ScalarTransform4f().look_at(
                origin=[0, 0, 0], target=view.forward.tolist(), up=view.up.tolist()
            ),
            "film": {"type": "hdrfilm", "width": scale * WIDTH, "height": scale * HEIGHT, "rfilter": film},
            "sampler": {"type": "independent", "sample_count": rays},
        }
    )


def photo(mi: Any, scene: Any, view: View, rng: Rng, seed: int) -> NDArray[np.uint8]:
    """The picture that a camera takes, (H, W, 3): sRGB, some of its noise taken away as cameras do."""
    lens = {"type": "gaussian", "stddev": float(rng.uniform(0.35, 0.6))}
    integrator = mi.load_dict({"type": "path", "max_depth": 3, "rr_depth": 10})
    sensor = camera(mi, view, 1, LIGHT_RAYS, lens)
    light = np.array(mi.render(scene, sensor=sensor, integrator=integrator, spp=LIGHT_RAYS, seed=seed))[..., :3]
    light *= rng.uniform(0.4, 0.9) / max(np.percentile(light.mean(axis=-1), 93), 1e-4)
    # Highlights are pressed together.
    light /= 1 + 0.6 * np.maximum(0, light - 0.6)
    value = np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055)
    picture = (255 * value.clip(0, 1) + 0.5).astype(np.uint8)
    return np.ascontiguousarray(cv2.fastNlMeansDenoisingColored(picture, None, 6, 6, 3, 11))


def depth(mi: Any, scene: Any, view: View, rng: Rng, seed: int) -> NDArray[np.float32]:
    """Distance along the camera's axis, (H, W) metres, the mean over each pixel's area of it or of its inverse."""
    integrator = mi.load_dict({"type": "aov", "aovs": "place:position"})
    sensor = camera(mi, view, DEPTH_RAYS, 1, {"type": "box"})
    places = np.array(mi.render(scene, sensor=sensor, integrator=integrator, spp=1, seed=seed))[..., -3:]
    found = (places @ view.forward).astype(np.float32)
    # Nothing is behind the open side of the room, and nothing beyond its walls.
    found = np.where(found > 0, found, 5).astype(np.float32)
    inverse = rng.uniform() < 0.6
    wanted = 1 / found if inverse else found
    # As resampled maps have it, neighbours take part.
    wanted = cv2.GaussianBlur(wanted, (0, 0), DEPTH_RAYS * rng.uniform(0.1, 0.5))
    mean = cv2.resize(wanted, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    return (1 / mean if inverse else mean).astype(np.float32)


def render(mi: Any, number: int, textures: Textures) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Photo, (H, W, 3), and depth, (H, W) metres, of a room."""
    rng = np.random.default_rng([SEED, number])
    view = look_around(rng)
    atlas = Atlas(rng, textures)
    room = furnish(atlas, rng, view)
    scene = mi.load_dict({"type": "scene"} | atlas.build(mi) | lights(rng, room))
    return photo(mi, scene, view, rng, number), depth(mi, scene, view, rng, number)


def main() -> None:
    """Render the frames that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the data set")
    parser.add_argument("--count", type=int, default=400, help="frames")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--textures", type=Path, help="folder of photos, pieces of which are on things and walls")
    parser.add_argument("--last", type=int, help="last of these photos, in sorted order from 0")
    parser.add_argument("--variant", default="llvm_ad_rgb", help="of Mitsuba; scalar_rgb is slower and needs no LLVM")
    options = parser.parse_args()
    import mitsuba as mi

    mi.set_variant(options.variant)
    photos = sorted(options.textures.iterdir()) if options.textures else []
    textures = Textures(photos[: None if options.last is None else options.last + 1])
    for number in range(options.first, options.first + options.count):
        stem = f"{number:04d}"
        files = options.out / "rgb" / f"{stem}.jpg", options.out / "depth" / f"{stem}.png"
        if all(file.exists() for file in files):
            continue
        start = time.monotonic()
        picture, metres = render(mi, number, textures)
        _, png = cv2.imencode(".png", (1000 * metres + 0.5).astype(np.uint16))
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        write_files({files[0]: encode_image(files[0], picture), files[1]: png.tobytes()})
        print(f"{stem}: {time.monotonic() - start:.1f} s, {metres.min():.2f} to {metres.max():.2f} m", flush=True)


if __name__ == "__main__":
    main()
