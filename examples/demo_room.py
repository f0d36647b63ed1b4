"""The room in the demo pair: paints, furniture, places. Metres; x right, y up, z into the room."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from demo_tracer import (
    Array,
    Box,
    Capsule,
    Disc,
    Ellipsoid,
    Paint,
    Point,
    Primitive,
    Scene,
    blade,
    circle,
    lathe,
    tube,
    vector,
)

LEFT, RIGHT, TOP, BACK, BEHIND = -2.3, 2.25, 2.7, 4.9, -1.2
WINDOW_Y, WINDOW_Z = (0.75, 2.4), (0.3, 2.5)  # in the left wall, outside the picture


def plain(*rgb: float) -> Paint:
    """One colour; sRGB values from 0 to 1 as a painter would pick them."""
    colour = vector(rgb) ** np.float32(2.2)
    return lambda p: np.broadcast_to(colour, p.shape)


def noise(x: Array, y: Array, seed: float = 0.0) -> Array:
    """Smooth value noise from 0 to 1 with a period of about one unit."""
    i, j = np.floor(x), np.floor(y)
    f, g = ((v * v * (3 - 2 * v)) for v in (x - i, y - j))
    a, b, c, d = (_hash(i + k, j + m, seed) for m in (0, 1) for k in (0, 1))
    out: Array = (a * (1 - f) + b * f) * (1 - g) + (c * (1 - f) + d * f) * g
    return out


def _hash(i: Array, j: Array, seed: float) -> Array:
    angle = i * np.float64(12.9898) + j * 78.233 + seed * 37.719  # float64: alike on every machine
    h = np.sin(angle) * 43758.547
    out: Array = h - np.floor(h)
    return out


def blend(low: Paint, high: Paint, amount: Callable[[Array], Array]) -> Paint:
    """From paint ``low`` to ``high`` where ``amount`` (0 to 1) grows."""

    def paint(p: Array) -> Array:
        w = amount(p)
        out: Array = low(p) * (1 - w) + high(p) * w
        return out

    return paint


def wood(dark: Paint, light: Paint, grain: Point = (4.0, 60.0), axes: tuple[int, int] = (0, 1)) -> Paint:
    """Streaks along the first of ``axes``; ``grain`` is streaks per metre along and across."""

    def streaks(p: Array) -> Array:
        x, y = p[axes[0]] * grain[0], p[axes[1]] * grain[1] + p[3 - sum(axes)] * 23
        return 0.55 * noise(x, y, 1) + 0.45 * noise(x * 3, y * 3.1, 2)

    return blend(dark, light, streaks)


def floor(p: Array) -> Array:
    """Oak planks, 13 cm wide, along z."""
    row = np.floor(p[0] / 0.13)
    board = np.floor(p[2] / 1.15 + _hash(row, row * 0, 3))
    tone = 0.72 + 0.36 * _hash(row, board, 5) + 0.22 * (noise(p[0] * 70, p[2] * 3 + board * 7, 4) - 0.5)
    across, along = p[0] / 0.13 - row, p[2] / 1.15 + _hash(row, row * 0, 3) - board
    seam = (across < 0.018) | (along < 0.0022)
    return vector((0.42, 0.245, 0.125)) * tone * np.where(seam, 0.45, 1)


def rug(p: Array) -> Array:
    """A flat-woven rug: bands across z with rows of diamonds."""
    v = (p[2] - 2.3) / 0.21
    band = np.floor(v).astype(int) % 6
    colours = np.array(
        [
            [0.56, 0.13, 0.08],
            [0.72, 0.62, 0.45],
            [0.05, 0.11, 0.2],
            [0.7, 0.36, 0.08],
            [0.72, 0.62, 0.45],
            [0.08, 0.2, 0.18],
        ],
        np.float32,
    ).T
    diamond = np.abs((p[0] / 0.19) % 1 - 0.5) + np.abs(v % 1 - 0.5) < 0.36
    inner = np.abs((p[0] / 0.19) % 1 - 0.5) + np.abs(v % 1 - 0.5) < 0.16
    weave = 0.82 + 0.3 * noise(p[0] * 260, p[2] * 260, 6)
    out: Array = np.where(diamond & ~inner, colours[:, (band + 2) % 6], colours[:, band]) * weave
    return out


def poster(p: Array) -> Array:
    """A print on the wall: sun, hills and lettering; it has no relief at all."""
    x, y = (p[0] + 0.83) / 0.86, (p[1] - 1.12) / 1.14
    image = np.broadcast_to(vector((0.78, 0.69, 0.52)), p.shape)
    radius = np.hypot((x - 0.6) * 0.86, (y - 0.66) * 1.14)
    image = np.where(radius < 0.23, vector((0.75, 0.17, 0.06)), image)
    image = np.where((radius > 0.27) & (radius < 0.29), vector((0.75, 0.17, 0.06)), image)
    hills = (
        (0.5, 0.09, 5, 0.4, (0.42, 0.36, 0.3)),
        (0.4, 0.07, 8, 2.0, (0.12, 0.27, 0.27)),
        (0.3, 0.05, 11, 4.2, (0.03, 0.1, 0.13)),
    )
    for height, swing, pitch, phase, colour in hills:
        image = np.where((y < height + swing * np.sin(pitch * x + phase)) & (y > 0.2), vector(colour), image)
    letters = (y > 0.09) & (y < 0.14) & (_hash(np.floor(x * 46), x * 0, 2) > 0.4) & (x > 0.12) & (x < 0.88)
    image = np.where(letters, vector((0.05, 0.06, 0.08)), image)
    rim = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y))
    return np.where(rim < 0.045, vector((0.8, 0.78, 0.72)), image)


def spine(rng: np.random.Generator, x: float, width: float, bottom: float, height: float) -> Paint:
    """A book's back: a colour, two bands and lettering, all printed."""
    palette = (
        (0.62, 0.17, 0.13),
        (0.13, 0.24, 0.4),
        (0.85, 0.8, 0.68),
        (0.16, 0.36, 0.3),
        (0.84, 0.6, 0.2),
        (0.2, 0.2, 0.23),
        (0.55, 0.62, 0.68),
        (0.5, 0.26, 0.36),
        (0.9, 0.88, 0.84),
    )
    back = palette[rng.integers(len(palette))]
    ink = (0.93, 0.87, 0.7) if sum(back) < 1.6 else (0.2, 0.14, 0.12)
    start, stop, key = rng.uniform(0.2, 0.35), rng.uniform(0.55, 0.75), float(rng.integers(99))

    def printed(p: Array) -> Array:
        u, v = (p[0] - x) / width, (p[1] - bottom) / height
        letters = (
            (np.abs(u - 0.5) < 0.2)
            & (v > start)
            & (v < stop)
            & (_hash(np.floor(v * height / 0.007), v * 0, key) > 0.35)
        )
        bands = (np.abs(v - 0.88) < 0.012) | (np.abs(v - 0.1) < 0.012)
        return np.where((letters | bands) & (p[2] < BACK - 0.1), 1.0, 0.0).astype(p.dtype)

    return blend(plain(*back), plain(*ink), printed)


WHITE, BLACK, STEEL = plain(0.93, 0.92, 0.9), plain(0.13, 0.13, 0.14), plain(0.72, 0.73, 0.75)
OAK = wood(plain(0.6, 0.42, 0.27), plain(0.8, 0.63, 0.45))
WALNUT = wood(plain(0.32, 0.2, 0.13), plain(0.5, 0.34, 0.23), (5.0, 90.0), (1, 0))


def shell() -> list[Primitive]:
    """Floor, ceiling, walls, window bars, skirting, rug and what hangs on the back wall."""
    wall, t = plain(0.9, 0.89, 0.86), 0.1
    (y0, y1), (z0, z1) = WINDOW_Y, WINDOW_Z
    carpet = blend(floor, rug, lambda p: ((abs(p[0] - 0.1) < 1.33) & (abs(p[2] - 3.14) < 0.84)).astype(p.dtype))
    parts: list[Primitive] = [
        Box((LEFT - t, -t, BEHIND - t), (RIGHT + t, 0, BACK + t), carpet),
        Box((LEFT - t, TOP, BEHIND - t), (RIGHT + t, TOP + t, BACK + t), wall),
        Box((LEFT - t, -t, BACK), (RIGHT + t, TOP + t, BACK + t), wall),
        Box((LEFT - t, -t, BEHIND - t), (RIGHT + t, TOP + t, BEHIND), wall),
        Box((RIGHT, -t, BEHIND - t), (RIGHT + t, TOP + t, BACK + t), wall),
        Box((LEFT - t, -t, BEHIND - t), (LEFT, y0, BACK + t), wall),
        Box((LEFT - t, y1, BEHIND - t), (LEFT, TOP + t, BACK + t), wall),
        Box((LEFT - t, y0 - t, BEHIND - t), (LEFT, y1 + t, z0), wall),
        Box((LEFT - t, y0 - t, z1), (LEFT, y1 + t, BACK + t), wall),
        Box((LEFT, 0, BACK - 0.015), (RIGHT, 0.09, BACK), WHITE),
        Box((RIGHT - 0.015, 0, BEHIND), (RIGHT, 0.09, BACK - 0.015), WHITE),
        Box((LEFT, 0, BEHIND), (LEFT + 0.015, 0.09, BACK - 0.015), WHITE),
    ]
    bar, middle = (LEFT - 0.02, LEFT + 0.03), y0 + 0.62 * (y1 - y0)
    parts += [Box((bar[0], y0, z - 0.02), (bar[1], y1, z + 0.02), WHITE) for z in np.linspace(z0, z1, 4)[1:3]]
    parts.append(Box((bar[0], middle - 0.02, z0), (bar[1], middle + 0.02, z1), WHITE))
    parts.append(Box((-0.83, 1.12, BACK - 0.001), (0.03, 2.26, BACK), poster))
    for x, y, hue in ((1.62, 1.72, (0.2, 0.33, 0.45)), (1.22, 1.58, (0.72, 0.45, 0.3))):
        parts.append(Box((x - 0.16, y - 0.21, BACK - 0.03), (x + 0.16, y + 0.21, BACK), BLACK))
        parts.append(Box((x - 0.145, y - 0.195, BACK - 0.0305), (x + 0.145, y + 0.195, BACK - 0.02), WHITE))
        parts.append(Box((x - 0.08, y - 0.12, BACK - 0.031), (x + 0.08, y + 0.12, BACK - 0.02), plain(*hue)))
    return parts


def bookshelf(rng: np.random.Generator) -> list[Primitive]:
    """An open shelf with printed books, a globe, a bowl and a vase before the white wall."""
    x0, x1, z0, top = -2.2, -1.18, BACK - 0.3, 2.02
    levels = (0.06, 0.45, 0.84, 1.23, 1.62, top)
    parts: list[Primitive] = [Box((x, 0, z0), (x + 0.022, top, BACK), OAK) for x in (x0, x1)]
    parts += [Box((x0 + 0.022, y, z0), (x1, y + 0.022, BACK), OAK) for y in levels]
    for row, y in enumerate(levels[:-1]):
        x, end = x0 + 0.03, x1 - (0.02, 0.36, 0.02, 0.42, 0.3)[row]
        while x < end - 0.05:
            width, height, depth = rng.uniform(0.02, 0.056), rng.uniform(0.19, 0.3), rng.uniform(0.14, 0.24)
            paint = spine(rng, x, width, y + 0.022, height)
            parts.append(Box((x, y + 0.022, BACK - 0.03 - depth), (x + width, y + 0.022 + height, BACK - 0.03), paint))
            x += width + 0.001 + (rng.uniform(0.04, 0.16) if rng.random() < 0.1 else 0)
    parts.append(
        Ellipsoid(
            (x1 - 0.18, 1.4, BACK - 0.15),
            (0.115, 0.115, 0.115),
            blend(
                plain(0.2, 0.42, 0.6),
                plain(0.72, 0.66, 0.4),
                lambda p: (noise(p[0] * 14, p[1] * 14, 8) > 0.55).astype(p.dtype),
            ),
        )
    )
    parts += lathe(x1 - 0.18, BACK - 0.15, ((1.252, 0.07), (1.262, 0.02), (1.3, 0.02)), BLACK)
    bowl = [(0.474 + 0.11 * s * s, 0.05 + 0.1 * s) for s in np.linspace(0, 1, 8)]
    parts += lathe(x1 - 0.19, BACK - 0.16, bowl, plain(0.75, 0.44, 0.3))
    jar = [(1.643 + 0.24 * s, 0.045 + 0.035 * math.sin(3.6 * s + 0.3)) for s in np.linspace(0, 1, 12)]
    return parts + lathe(x1 - 0.14, BACK - 0.16, jar, plain(0.88, 0.87, 0.83))


def bicycle() -> list[Primitive]:
    """A bicycle that leans on the back wall: spokes, chain ring and thin tubes."""
    paint, rubber, leather = plain(0.1, 0.42, 0.43), plain(0.16, 0.16, 0.17), plain(0.5, 0.28, 0.15)

    def at(u: float, v: float, w: float = 0.0) -> Array:
        return vector((0.62 + u, v, BACK - 0.34 + 0.12 * v + w))

    rear, front, crank, seat, head, crown = (
        (0, 0.345),
        (1.02, 0.345),
        (0.43, 0.28),
        (0.29, 0.8),
        (0.85, 0.86),
        (0.9, 0.71),
    )
    parts: list[Primitive] = []
    for u, v in (rear, front):
        hub, up = at(u, v), (0, 1, 0.12)
        parts += tube(circle(hub, 0.33, 40, (1, 0, 0), up), 0.015, rubber)
        parts += tube(circle(hub, 0.31, 40, (1, 0, 0), up), 0.008, STEEL)
        rim = circle(hub, 0.31, 20, (1, 0, 0), up)
        parts += [Capsule(hub, p, 0.0024, BLACK) for p in rim[:-1]]
        parts.append(Capsule(at(u, v, -0.05), at(u, v, 0.05), 0.018, STEEL))
    for a, b in ((crank, seat), (seat, head), (crank, crown), (head, crown)):
        parts.append(Capsule(at(*a), at(*b), 0.017, paint))
    for w in (-0.06, 0.06):
        parts += tube((at(*seat), at(*rear, w), at(*crank, w / 3)), 0.008, paint)
        parts += tube((at(*crown, w / 3), at(0.96, 0.55, w), at(*front, w)), 0.011, paint)
        parts += tube((at(*crank, w), at(0.43 - w * 2.4, 0.28 - w * 1.5, w * 1.2)), 0.009, STEEL)
        parts.append(
            Capsule(
                at(0.43 - w * 2.4, 0.28 - w * 1.5, w * 1.2),
                at(0.43 - w * 2.4, 0.28 - w * 1.5, w * 2.6),
                0.014,
                BLACK,
            )
        )
        drop = [(0.81, 0.94), (0.9, 0.94), (0.97, 0.92), (0.99, 0.86), (0.96, 0.81), (0.88, 0.79)]
        parts += tube([at(0.81, 0.94), *(at(u, v, w * 3) for u, v in drop)], 0.011, leather)
    parts += tube(circle(at(*crank, -0.05), 0.09, 28, (1, 0, 0), (0, 1, 0.12)), 0.005, STEEL)
    parts += tube(
        (at(0.43, 0.37, -0.05), at(0, 0.375, -0.05), at(0, 0.315, -0.05), at(0.43, 0.19, -0.05)), 0.004, BLACK
    )
    parts += tube((at(*seat), at(0.255, 0.93)), 0.012, STEEL) + tube(
        (at(*head), at(0.835, 0.94), at(0.81, 0.94)), 0.013, STEEL
    )
    for w in (-0.05, 0.05):
        parts += tube((at(0.42, 0.945), at(0.25, 0.945, w / 2), at(0.16, 0.96, w)), 0.026, leather)
    return parts


def chair() -> list[Primitive]:
    """A spindle-back chair."""
    cos, sin = math.cos(-0.5), math.sin(-0.5)

    def at(x: float, y: float, z: float) -> Array:
        return vector((0.62 + cos * x - sin * z, y, 2.72 + sin * x + cos * z))

    parts = lathe(0.62, 2.72, ((0.43, 0.19), (0.437, 0.21), (0.457, 0.21), (0.463, 0.2)), WALNUT)
    parts += [Disc((0.62, 0.463, 2.72), 0.2, WALNUT), Disc((0.62, 0.43, 2.72), 0.19, WALNUT)]
    for x, z in ((-1, -1), (1, -1), (-1, 1), (1, 1)):
        top, foot = at(0.11 * x, 0.44, 0.11 * z), at(0.2 * x, 0.012, 0.2 * z)
        parts += tube((top, (top + foot) / 2), 0.014, WALNUT) + tube(((top + foot) / 2, foot), 0.011, WALNUT)
    for x in (-1, 1):
        parts.append(Capsule(at(0.165 * x, 0.18, -0.165), at(0.165 * x, 0.18, 0.165), 0.008, WALNUT))
    parts.append(Capsule(at(-0.165, 0.18, 0), at(0.165, 0.18, 0), 0.008, WALNUT))

    def bow(a: float) -> Array:
        height = 0.5 * math.sin(a) ** 0.55
        return at(
            -0.165 * math.cos(a) * (1 + 0.7 * height),
            0.46 + height,
            0.12 + 0.06 * math.sin(a) + 0.24 * height,
        )

    parts += tube([bow(a) for a in np.linspace(0.02, math.pi - 0.02, 33)], 0.011, WALNUT)
    for x in np.linspace(-0.78, 0.78, 8):
        parts.append(Capsule(at(0.15 * x, 0.46, 0.12 + 0.05 * (1 - x * x)), bow(math.acos(-x)), 0.0062, WALNUT))
    return parts


def table(rng: np.random.Generator) -> list[Primitive]:
    """A round table on hairpin legs with a mug, two books and a vase of thin stems."""
    x, z, y = -0.62, 2.95, 0.72
    top = wood(plain(0.66, 0.47, 0.3), plain(0.82, 0.65, 0.45), (3.0, 40.0), (0, 2))
    parts = [
        Disc((x, y, z), 0.42, top),
        Disc((x, y - 0.025, z), 0.42, top),
        *lathe(x, z, ((y - 0.025, 0.42), (y, 0.42)), top),
    ]
    for a in (0.5, 2.6, 4.7):
        legs = [
            vector((x + r * math.cos(a + s), h, z + r * math.sin(a + s)))
            for r, h, s in (
                (0.28, y - 0.02, -0.22),
                (0.38, 0.02, -0.02),
                (0.38, 0.02, 0.02),
                (0.28, y - 0.02, 0.22),
            )
        ]
        parts += tube(legs, 0.006, BLACK)
    vx, vz = x + 0.06, z + 0.1
    vase = [(y + 0.001 + 0.24 * s, 0.04 + 0.045 * math.sin(2.9 * s + 0.2) ** 2) for s in np.linspace(0, 1, 14)]
    parts += lathe(vx, vz, vase, plain(0.3, 0.42, 0.5))
    for i in range(11):
        a, lean, length = i * 2.4, rng.uniform(0.1, 0.42), rng.uniform(0.3, 0.52)
        stem = [
            vector(
                (
                    vx + lean * s * s * math.cos(a),
                    y + 0.1 + 0.14 * s + length * s,
                    vz + lean * s * s * math.sin(a),
                )
            )
            for s in np.linspace(0, 1, 6)
        ]
        parts += tube(stem, 0.0028, plain(0.36, 0.42, 0.22))
        for k, p in enumerate(stem[2:]):
            for turn in (0.9, -0.9):
                paint = plain(*(np.array((0.42, 0.53, 0.38)) * rng.uniform(0.8, 1.2)))
                parts += blade(p, a + turn + k, rng.uniform(0.1, 0.8), 0.085, 0.034, 0.7, paint, 3)
    mug = plain(0.93, 0.9, 0.84)
    mx, mz = x + 0.2, z - 0.17
    parts += lathe(mx, mz, ((y, 0.038), (y + 0.012, 0.042), (y + 0.095, 0.042)), mug)
    parts += [Disc((mx, y + 0.08, mz), 0.041, plain(0.25, 0.15, 0.1))]
    parts += tube(circle((mx + 0.045, y + 0.05, mz), 0.026, 14, (1, 0, 0)), 0.006, mug)
    parts.append(Box((x - 0.29, y, z - 0.24), (x - 0.07, y + 0.028, z - 0.08), plain(0.75, 0.28, 0.2), 0.3))
    parts.append(Box((x - 0.27, y + 0.028, z - 0.23), (x - 0.08, y + 0.05, z - 0.1), plain(0.9, 0.86, 0.76), 0.55))
    return parts


def lamps() -> list[Primitive]:
    """A white floor lamp before the white wall, and a white globe on a thin cord."""
    parts = [*lathe(-0.98, 4.5, ((0.0, 0.14), (0.02, 0.13)), WHITE), Disc((-0.98, 0.02, 4.5), 0.13, WHITE)]
    parts += [
        Capsule((-0.98, 0.02, 4.5), (-0.98, 1.6, 4.5), 0.01, WHITE),
        *lathe(-0.98, 4.5, ((1.42, 0.2), (1.74, 0.12)), WHITE),
    ]
    parts += [
        Capsule((0.72, 2.1, 3.5), (0.72, TOP, 3.5), 0.0045, BLACK),
        Ellipsoid((0.72, 1.98, 3.5), (0.15, 0.15, 0.15), WHITE),
    ]
    return parts + lathe(0.72, 3.5, ((2.1, 0.04), (2.16, 0.02)), STEEL)


def basket_and_pouf() -> list[Primitive]:
    """A wire basket with balls of wool, and a striped pouf."""
    x, z = 1.42, 3.35
    parts: list[Primitive] = []
    for s in np.linspace(0, 1, 6):
        parts += tube(circle((x, 0.01 + 0.34 * s, z), 0.17 + 0.06 * s, 28, (1, 0, 0), (0, 0, 1)), 0.0035, BLACK)
    for low, high in zip(
        circle((x, 0.01, z), 0.17, 24, (1, 0, 0), (0, 0, 1)),
        circle((x, 0.35, z), 0.23, 24, (1, 0, 0), (0, 0, 1)),
        strict=True,
    ):
        parts.append(Capsule(low, high, 0.003, BLACK))
    wool = (
        (0.06, 0.1, -0.05, 0.095, (0.82, 0.6, 0.25)),
        (-0.08, 0.1, 0.03, 0.09, (0.7, 0.3, 0.25)),
        (0.02, 0.25, 0.04, 0.1, (0.86, 0.82, 0.74)),
    )
    for dx, y, dz, r, hue in wool:
        strands = blend(
            plain(*hue), plain(*(0.6 * h for h in hue)), lambda p: noise(p[0] * 9 + p[1] * 150, p[2] * 90, 9)
        )
        parts.append(Ellipsoid((x + dx, y, z + dz), (r, r, r), strands))
    stripes = blend(
        plain(0.84, 0.78, 0.68),
        plain(0.3, 0.38, 0.45),
        lambda p: (np.sin(12 * np.arctan2(p[2] - 4.05, p[0] - 0.02)) > 0.2).astype(p.dtype),
    )
    return [*parts, Ellipsoid((0.02, 0.19, 4.05), (0.3, 0.19, 0.3), stripes)]


def palm(rng: np.random.Generator) -> list[Primitive]:
    """A potted plant with long arching leaves near the camera."""
    x, z = -1.02, 1.95
    parts = lathe(x, z, ((0.0, 0.13), (0.4, 0.18), (0.42, 0.18), (0.43, 0.17)), plain(0.78, 0.5, 0.37))
    parts.append(Disc((x, 0.4, z), 0.17, plain(0.22, 0.16, 0.12)))
    for i in range(34):
        heading, rise = i * 2.39996 + rng.uniform(-0.2, 0.2), rng.uniform(0.95, 1.5)
        paint = plain(*(np.array((0.3, 0.47, 0.2)) * rng.uniform(0.75, 1.25)))
        root = (x + 0.05 * math.cos(heading), 0.4, z + 0.05 * math.sin(heading))
        parts += blade(
            root,
            heading,
            rise,
            rng.uniform(0.6, 1.15),
            rng.uniform(0.024, 0.04),
            rng.uniform(0.9, 2.0),
            paint,
        )
    return parts


def room(seed: int) -> Scene:
    """Put everything into one scene."""
    rng = np.random.default_rng(seed)
    parts = shell() + bookshelf(rng) + bicycle() + chair() + table(rng) + lamps() + basket_and_pouf() + palm(rng)
    return Scene(parts)
