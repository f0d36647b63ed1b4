"""Shapes and textures of random rooms, in numpy. Lengths in units of a thing's own size, about 1.

A mesh is (vertices (V, 3), triangles (F, 3), texture coordinates (V, 2)). Faces that meet at an edge have vertices of
their own, so that normals averaged at vertices keep edges sharp.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rng = np.random.Generator


class Mesh(NamedTuple):
    """Triangles with texture coordinates."""

    vertices: Array
    faces: NDArray[np.int64]
    uv: Array


# --- meshes ---


def surface(
    point: Callable[[Array, Array], Array], rows: int, columns: int, repeat: tuple[float, float] = (1, 1)
) -> Mesh:
    """A grid over the unit square, each point of which is moved to ``point(u, v)``, (..., 3)."""
    u, v = np.meshgrid(np.linspace(0, 1, rows), np.linspace(0, 1, columns), indexing="ij")
    i, j = np.meshgrid(np.arange(rows - 1), np.arange(columns - 1), indexing="ij")
    a = (i * columns + j).ravel()
    b, c, d = a + 1, a + columns, a + columns + 1
    faces = np.concatenate([np.stack([a, c, b], axis=1), np.stack([b, c, d], axis=1)])
    return Mesh(point(u, v).reshape(-1, 3), faces, np.stack([u * repeat[0], v * repeat[1]], axis=-1).reshape(-1, 2))


def merge(meshes: list[Mesh]) -> Mesh:
    """Many meshes as one."""
    first = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes[:-1])])
    return Mesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.faces + start for mesh, start in zip(meshes, first, strict=True)]),
        np.concatenate([mesh.uv for mesh in meshes]),
    )


def placed(
    mesh: Mesh, turn: Array | None = None, to: Array | tuple[float, float, float] = (0, 0, 0), size: float = 1
) -> Mesh:
    """A mesh enlarged, turned by a rotation matrix, and moved."""
    vertices = mesh.vertices * size
    return mesh._replace(vertices=(vertices if turn is None else vertices @ turn.T) + np.asarray(to))


def rotation(rng: Rng, *, upright: bool = False) -> Array:
    """A random rotation matrix; ``upright`` about the vertical axis (y) only."""
    if upright:
        c, s = np.cos(angle := rng.uniform(0, 2 * np.pi)), np.sin(angle)
        return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    # The orthogonal part of a Gaussian matrix is uniform over all rotations and reflections.
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else -q


def box(width: float, height: float, depth: float) -> Mesh:
    """A box about the origin."""
    corners, uv = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1.0]]), np.array([[0, 0], [1, 0], [1, 1], [0, 1.0]])
    sides = []
    for axis in range(3):
        for end in (-1, 1):
            vertices = np.insert(corners, axis, end, axis=1) * (width, height, depth) / 2
            sides.append(Mesh(vertices, np.array([[0, 1, 2], [0, 2, 3]]), uv))
    return merge(sides)


def turned(radius: Callable[[Array], Array], rows: int = 40, columns: int = 48) -> Mesh:
    """A solid of revolution about y: ``radius`` of heights from 0 to 1."""

    def point(u: Array, v: Array) -> Array:
        return np.stack([radius(v) * np.cos(2 * np.pi * u), v - 0.5, radius(v) * np.sin(2 * np.pi * u)], axis=-1)

    return surface(point, rows, columns, (3, 1))


def cylinder(radius: float, height: float, sides: int = 32) -> Mesh:
    """A closed cylinder about y."""

    def disc(end: float) -> Mesh:
        def point(u: Array, v: Array) -> Array:
            x, z = radius * v * np.cos(2 * np.pi * u), radius * v * np.sin(2 * np.pi * u)
            return np.stack([x, np.full_like(u, end * height), z], axis=-1)

        return surface(point, sides, 2)

    wall = turned(lambda v: np.full_like(v, radius), sides, 2)
    return merge([wall._replace(vertices=wall.vertices * (1, height, 1)), disc(-0.5), disc(0.5)])


def vase(rng: Rng) -> Mesh:
    """A turned thing of random outline."""
    knots = rng.integers(3, 7)
    outline = np.abs(rng.normal(0.25, 0.12, knots)) + 0.04
    fine = np.interp(np.linspace(0, 1, 64), np.linspace(0, 1, knots), outline)
    if rng.uniform() < 0.7:
        fine = np.convolve(np.pad(fine, 4, mode="edge"), np.full(9, 1 / 9), "valid")
    return turned(lambda v: np.interp(v, np.linspace(0, 1, 64), fine))


def cone(rng: Rng) -> Mesh:
    """A cone, now and then cut off."""
    base, top = rng.uniform(0.15, 0.5), rng.uniform(0, 0.15) * (rng.uniform() < 0.3)
    return turned(lambda v: base + (top - base) * v)


def ball(rng: Rng) -> Mesh:
    """A superquadric: from a box with soft edges by a ball to an octahedron."""
    tall, wide = rng.uniform(0.2, 1.8, 2)

    def power(value: Array, exponent: float) -> Array:
        return np.sign(value) * np.abs(value) ** exponent

    def point(u: Array, v: Array) -> Array:
        a, b = 2 * np.pi * u - np.pi, np.pi * (v - 0.5)
        ring = power(np.cos(b), tall)
        return 0.5 * np.stack(
            [ring * power(np.cos(a), wide), power(np.sin(b), tall), ring * power(np.sin(a), wide)], -1
        )

    return surface(point, 48, 32, (2, 1))


def stone(rng: Rng) -> Mesh:
    """A ball with bumps."""
    waves, phases, heights = rng.normal(0, 4, (6, 3)), rng.uniform(0, 6, 6), rng.uniform(0, 0.12, 6)

    def point(u: Array, v: Array) -> Array:
        a, b = 2 * np.pi * u, np.pi * (v - 0.5)
        outward = np.stack([np.cos(b) * np.cos(a), np.sin(b), np.cos(b) * np.sin(a)], axis=-1)
        return 0.5 * outward * (1 + (np.sin(outward @ waves.T + phases) * heights).sum(axis=-1, keepdims=True))

    return surface(point, 64, 48, (2, 1))


def ring(rng: Rng) -> Mesh:
    """A torus."""
    thin = rng.uniform(0.04, 0.2)

    def point(u: Array, v: Array) -> Array:
        out = 0.5 - thin + thin * np.cos(2 * np.pi * v)
        return np.stack(
            [out * np.cos(2 * np.pi * u), thin * np.sin(2 * np.pi * v), out * np.sin(2 * np.pi * u)], axis=-1
        )

    return surface(point, 48, 20, (4, 1))


def plate(rng: Rng) -> Mesh:
    """A board of random outline (star, cloud or polygon), now and then with a hole."""
    angle = np.linspace(0, 2 * np.pi, 120)
    kind = rng.integers(3)
    if kind == 0:
        spikes = rng.uniform(0.25, 0.5, 2 * rng.integers(3, 9))
        radius = np.interp(angle, np.linspace(0, 2 * np.pi, len(spikes) + 1), [*spikes, spikes[0]])
    elif kind == 1:
        waves = range(1, 8)
        radius = 0.4 + sum(rng.normal(0, 0.08 / (k + 1)) * np.cos(k * angle + rng.uniform(0, 6)) for k in waves)
        radius = np.maximum(radius, 0.08)
    else:
        half = np.pi / rng.integers(3, 7)
        radius = 0.5 * np.cos(half) / np.cos(angle % (2 * half) - half)
    outline = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    hole = rng.uniform(0.5, 0.85) if rng.uniform() < 0.35 else 0.0
    thick = rng.uniform(0.01, 0.15)

    def between(inner: Array, inner_z: float, outer: Array, outer_z: float) -> Mesh:
        ends = [np.column_stack([line, np.full(len(line), z)]) for line, z in ((inner, inner_z), (outer, outer_z))]
        mesh = surface(lambda u, v: np.stack(ends), 2, len(angle))
        return mesh._replace(uv=mesh.vertices[:, :2] + 0.5)

    parts = [between(hole * outline, z, outline, z) for z in (-thick / 2, thick / 2)]
    parts += [
        between(line, -thick / 2, line, thick / 2) for line in ((outline, hole * outline) if hole else (outline,))
    ]
    return merge(parts)


def cloth(rng: Rng) -> Mesh:
    """A crumpled, curled sheet."""
    count = 64
    bumps = cv2.GaussianBlur(rng.normal(size=(count, count)), (0, 0), rng.uniform(3, 9))
    bumps *= rng.uniform(0.03, 0.15) / bumps.std()
    curl = rng.uniform(0.1, 1.5) * rng.choice([-1, 1])

    def point(u: Array, v: Array) -> Array:
        along = (u - 0.5) * curl
        return np.stack([np.sin(along) / curl, v - 0.5, bumps + (1 - np.cos(along)) / curl], axis=-1)

    return surface(point, count, count)


def rods(rng: Rng) -> Mesh:
    """Sticks, upright or pointing anywhere."""
    radius = 0.006 * 10 ** rng.uniform()
    sticks = []
    for _ in range(rng.integers(2, 14)):
        turn = rotation(rng) if rng.uniform() < 0.5 else None
        sticks.append(placed(cylinder(radius, rng.uniform(0.5, 1), 10), turn, rng.uniform(-0.35, 0.35, 3)))
    return merge(sticks)


def brushes(rng: Rng) -> list[Mesh]:
    """A cup with sticks that lean in all directions."""
    cup, sticks = placed(cylinder(0.15, 0.3), to=(0, -0.35, 0)), []
    for _ in range(rng.integers(2, 8)):
        lean = rotation(rng, upright=True) @ np.array([rng.uniform(0, 0.35), 1, 0])
        lean /= np.linalg.norm(lean)
        aside = np.cross(lean, [0, 0, 1])
        aside /= np.linalg.norm(aside)
        turn = np.stack([aside, lean, np.cross(aside, lean)], axis=1)
        length = rng.uniform(0.4, 1)
        sticks.append(placed(cylinder(rng.uniform(0.01, 0.04), length, 10), turn, (0, -0.45, 0) + lean * length / 2))
    return [cup, merge(sticks)]


def lattice(rng: Rng) -> Mesh:
    """A fence or a window's bars."""
    bar = rng.uniform(0.01, 0.08)
    upright = [placed(box(bar, 1, bar), to=(x, 0, 0)) for x in np.linspace(-0.5, 0.5, rng.integers(2, 8))]
    level = [placed(box(1, bar, bar), to=(0, y, 0)) for y in np.linspace(-0.5, 0.5, rng.integers(2, 8))]
    return merge(upright + level)


def leaves(rng: Rng) -> Mesh:
    """A plant: bent leaves in all directions."""
    plant = []
    for _ in range(rng.integers(10, 50)):
        length, width = rng.uniform(0.1, 0.3), rng.uniform(0.02, 0.1)

        def point(u: Array, v: Array, length: float = length, width: float = width) -> Array:
            return np.stack([width * np.sin(np.pi * v) * (u - 0.5), length * v, 0.3 * length * v * v], axis=-1)

        plant.append(placed(surface(point, 3, 9), rotation(rng), rng.normal(0, 0.12, 3)))
    return merge(plant)


def table(rng: Rng) -> Mesh:
    """A table, or a chair with a back."""
    width, depth, height = rng.uniform(0.6, 1), rng.uniform(0.4, 1), rng.uniform(0.3, 0.9)
    board, leg = rng.uniform(0.02, 0.06, 2)
    corners = [(x * (width - leg) / 2, z * (depth - leg) / 2) for x in (-1, 1) for z in (-1, 1)]
    parts = [placed(box(width, board, depth), to=(0, height / 2, 0))]
    parts += [placed(box(leg, height, leg), to=(x, 0, z)) for x, z in corners]
    if rng.uniform() < 0.5:
        back, posts = rng.uniform(0.3, 0.6), rng.integers(2, 6)
        across = np.linspace((leg - width) / 2, (width - leg) / 2, posts)
        parts += [placed(box(leg, back, leg), to=(x, (height + back) / 2, -depth / 2)) for x in across]
        parts.append(placed(box(width, 1.5 * leg, leg), to=(0, height / 2 + back, -depth / 2)))
    return merge(parts)


def mug(rng: Rng) -> Mesh:
    """A cylinder with a handle."""
    flat = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0.0]])
    return merge([cylinder(0.35, 0.8), placed(ring(rng), flat, (0.4, 0, 0), 0.5)])


def books(rng: Rng) -> list[Mesh]:
    """A row of books, each a thing of its own."""
    row, left = [], -0.5
    while left < 0.5:
        thick, height = rng.uniform(0.015, 0.07), rng.uniform(0.5, 1)
        row.append(
            placed(
                box(0.95 * thick, height, rng.uniform(0.5, 0.7)), to=(left, height / 2 - 0.5, rng.uniform(-0.1, 0.1))
            )
        )
        left += thick
    return row


# How often each is drawn.
_THINGS: tuple[tuple[float, Callable[[Rng], Mesh | list[Mesh]]], ...] = (
    (2, lambda rng: box(*rng.uniform(0.15, 1, 3))),
    (0.7, lambda rng: cylinder(rng.uniform(0.1, 0.5), rng.uniform(0.3, 1))),
    *((3, rods), (2.5, plate), (2, leaves), (2, table), (2, brushes), (1.5, lattice), (1.5, stone), (1.5, books)),
    *((1.2, vase), (1.2, ball), (1.2, cloth), (1, ring), (0.7, cone), (0.7, mug)),
)


def thing(rng: Rng) -> list[Mesh]:
    """A random thing, as one mesh for each texture that it has."""
    shares = np.array([share for share, _ in _THINGS])
    made = _THINGS[rng.choice(len(_THINGS), p=shares / shares.sum())][1](rng)
    return made if isinstance(made, list) else [made]


# --- textures ---

_SIDE = 256


def clouds(rng: Rng, first: int = 0) -> Array:
    """Noise of several octaves from ``first`` on, (256, 256) in [0, 1]."""
    total = np.zeros((_SIDE, _SIDE))
    for octave in range(first, 7):
        cells = rng.normal(size=(2 ** (octave + 1),) * 2)
        total += cv2.resize(cells, (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC) * 2 ** (
            -rng.uniform(0.4, 1.2) * octave
        )
    return (total - total.min()) / np.ptp(total)


def _stripes(rng: Rng, x: Array, y: Array) -> Array:
    slant, bend = rng.integers(2, 20) * np.array([1, rng.uniform(-1, 1)]), rng.uniform(0, 0.5)
    return (np.sin(2 * np.pi * (slant[0] * x + slant[1] * y + bend * clouds(rng))) > rng.uniform(-0.8, 0.8)) * 1.0


def _checks(rng: Rng, x: Array, y: Array) -> Array:
    count = rng.integers(2, 12)
    return (np.floor(count * x) + np.floor(count * y)) % 2


def _wood(rng: Rng, x: Array, y: Array) -> Array:
    return 0.5 + 0.5 * np.sin(2 * np.pi * (rng.uniform(2, 12) * x + rng.uniform(0.3, 2) * clouds(rng)))


def _dots(rng: Rng, x: Array, y: Array) -> Array:
    picture = np.zeros(x.shape)
    for _ in range(rng.integers(5, 60)):
        cv2.circle(picture, rng.integers(0, _SIDE, 2).tolist(), int(rng.integers(2, 30)), float(rng.uniform()), -1)
    return picture


def _words(rng: Rng, x: Array, y: Array) -> Array:
    picture = np.zeros(x.shape, np.uint8)
    for _ in range(rng.integers(2, 14)):
        text = bytes(rng.integers(48, 122, rng.integers(2, 12)).tolist()).decode()
        place, size = rng.integers(0, _SIDE, 2).tolist(), float(rng.uniform(0.4, 3))
        cv2.putText(
            picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, int(rng.integers(80, 255)), int(rng.integers(1, 6))
        )
    return picture / 255


def pattern(rng: Rng) -> Array:
    """A random texture: two colours mixed by a pattern, with stains; (256, 256, 3) linear light in [0, 1]."""
    y, x = np.mgrid[0:_SIDE, 0:_SIDE] / _SIDE
    patterns = (_stripes, _checks, _wood, _dots, _words)
    kind = rng.integers(len(patterns) + 2)
    if kind < len(patterns):
        mix = patterns[kind](rng, x, y)
    else:
        mix = clouds(rng, rng.integers(0, 4)) if kind == len(patterns) else 0.45 + 0.1 * clouds(rng)
    one, other = rng.uniform(0.03, 0.95, (2, 3)) ** rng.uniform(0.8, 2)
    stains = 1 - 0.5 * rng.uniform() * clouds(rng, rng.integers(0, 5))
    return np.clip((one + (other - one) * mix[..., None]) * stains[..., None], 0, 1)


class Textures:
    """Random textures: patterns and, every second time, pieces of photos.

    Args:
        photos: Image files; none: patterns only.
    """

    SMALLEST, LARGEST = 40, 300
    # Some photos have a white border.
    BORDER = 12

    def __init__(self, photos: list[Path]) -> None:
        self._photos = photos

    def draw(self, rng: Rng) -> Array:
        """Return (h, w, 3) linear light in [0, 1]."""
        if not self._photos or rng.uniform() < 0.5:
            return pattern(rng)
        path = self._photos[rng.integers(len(self._photos))]
        photo = cv2.imread(str(path))
        least = self.SMALLEST + 2 * self.BORDER
        if photo is None or min(photo.shape[:2]) <= least:
            raise SystemExit(f"{path}: must be an image of more than {least} pixels a side, or not among the textures")
        photo = photo[self.BORDER : -self.BORDER, self.BORDER : -self.BORDER, ::-1]
        side = int(rng.integers(self.SMALLEST, min(self.LARGEST, *photo.shape[:2])))
        top, left = (int(rng.integers(length - side + 1)) for length in photo.shape[:2])
        return (photo[top : top + side, left : left + side] / 255) ** 2.2

    def tile(self, rng: Rng, side: int, repeats: float) -> Array:
        """A texture mirrored until it fills a square of ``side`` pixels about ``repeats`` times a side."""
        small = max(8, int(side / repeats))
        image = cv2.resize(self.draw(rng), (small, small), interpolation=cv2.INTER_AREA)
        count = -(-side // (2 * small))
        mirrored = np.concatenate([image, image[:, ::-1]], axis=1)
        mirrored = np.concatenate([mirrored, mirrored[::-1]], axis=0)
        return np.tile(mirrored, (count, count, 1))[:side, :side]
