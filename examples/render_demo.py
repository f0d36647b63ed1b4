"""Renders the bundled demo pair: a room photographed by a phone, and its exact planar depth.

A small path tracer in numpy: ``demo_tracer.py`` has the shapes, ``demo_room.py`` the room, this file light
and lens.
Colour is supersampled, softened and noisy like a photo; depth is one exact ray through each pixel centre.

    python examples/render_demo.py --out ddfup/demo
"""

from __future__ import annotations

import argparse
import math
import time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from demo_room import LEFT, WINDOW_Y, WINDOW_Z, room
from demo_tracer import Array, Scene, dot, unit, vector
from numpy.typing import NDArray
from PIL import Image

EYE, PITCH, HALF_WIDTH = (
    (0.0, 1.38, 0.0),
    math.radians(8.0),
    0.62,
)  # HALF_WIDTH: tan of half the field of view
SKY, SUN = (
    vector((11.5, 12.6, 14.2)),
    vector((6.6, 5.7, 4.6)),
)  # radiance of the sky; irradiance / pi of the sun
SUN_DIRECTION, SUN_WIDTH = unit(vector((-0.66, 0.42, -0.62))), np.float32(0.02)
AMBIENT = 0.25  # stands for the light of all bounces that are not traced
OFF_SURFACE = np.float32(2e-3)  # metres between a surface and the rays that start there
ROWS = 48  # per task: large enough for numpy, small enough for memory

_room = lru_cache(maxsize=1)(room)  # once per process


def camera_rays(x: Array, y: Array, width: int, height: int) -> tuple[Array, Array]:
    """Return unit directions (3, n) through image points in pixels, and their cosines to the viewing axis."""
    u, v = (2 * x - width) / width * HALF_WIDTH, (height - 2 * y) / width * HALF_WIDTH
    d = np.stack([u, v * math.cos(PITCH) - math.sin(PITCH), v * math.sin(PITCH) + math.cos(PITCH)])
    length = np.sqrt(dot(d, d))
    return d / length, 1 / length


def _unblocked(scene: Scene, o: Array, d: Array, reach: Array, weight: Array) -> Array:
    """Return ``weight`` (n,), and 0 where something stands within ``reach`` of the ray."""
    lit = np.flatnonzero(weight > 0)
    t, _ = scene.trace(o.take(lit, 1), d.take(lit, 1), reach[lit])
    out = np.zeros_like(weight)
    out[lit] = weight[lit] * (t > 0)
    return out


def sky_light(scene: Scene, p: Array, normal: Array, u: Array) -> Array:
    """Return the sky's light / pi (3, n) at points, from one random place ``u`` (2, n) in the window."""
    (y0, y1), (z0, z1) = WINDOW_Y, WINDOW_Z
    o = p + normal * OFF_SURFACE
    away = np.stack([np.full_like(u[0], LEFT), y0 + (y1 - y0) * u[0], z0 + (z1 - z0) * u[1]]) - o
    square = dot(away, away)
    reach = np.sqrt(square)
    d = away / reach
    cosines = np.maximum(dot(d, normal), 0) * np.maximum(-d[0], 0)
    weight = np.minimum(cosines * ((y1 - y0) * (z1 - z0) / math.pi) / square, 1)  # beside the window: no speckle
    return SKY * _unblocked(scene, o, d, reach, weight)


def sun_light(scene: Scene, p: Array, normal: Array, u: Array) -> Array:
    """Return the sun's light / pi (3, n) at points, from one random place ``u`` (2, n) on its disc."""
    o = p + normal * OFF_SURFACE
    d = unit(SUN_DIRECTION + np.stack([u[0] * 0, u[0] - 0.5, u[1] - 0.5]) * SUN_WIDTH)
    reach = (LEFT - o[0]) / d[0]
    y, z = o[1] + reach * d[1], o[2] + reach * d[2]
    through = (y > WINDOW_Y[0]) & (y < WINDOW_Y[1]) & (z > WINDOW_Z[0]) & (z < WINDOW_Z[1])
    return SUN * _unblocked(scene, o, d, reach, np.where(through, np.maximum(dot(d, normal), 0), 0))


def bounce(normal: Array, u: Array) -> Array:
    """Return cosine-distributed directions (3, n) about normals, from a unit sphere on the normal's tip."""
    height, angle = 1 - 2 * u[0], 2 * np.float32(math.pi) * u[1]
    ring = np.sqrt(np.maximum(1 - height * height, 0))
    return unit(normal + np.float32(0.999) * np.stack([ring * np.cos(angle), height, ring * np.sin(angle)]))


def render_rows(first: int, width: int, height: int, samples: int, seed: int) -> dict[str, Array]:
    """Render up to ``ROWS`` rows from ``first`` on.

    Returns:
        Images of (rows, width, channels). From pixel centres: ``depth`` (planar, metres) and ``normal``.
        Averages over pixels: ``sky`` and ``indirect`` light that arrives, ``albedo``, light that leaves:
        ``diffuse`` by those and ``sun``. ``mixed``: the part of the pixel at another depth than its centre.
    """
    scene, rows = _room(seed), range(first, min(first + ROWS, height))
    y, x = (v.ravel() for v in np.meshgrid(rows, range(width), indexing="ij"))
    eye = np.tile(vector(EYE), x.size)
    d, cosine = camera_rays(x + 0.5, y + 0.5, width, height)
    t_centre, which = scene.trace(eye.astype(np.float64), d)
    normal, _ = scene.surface(eye + t_centre * d, d, which)
    out = {"depth": (t_centre * cosine)[None], "normal": normal, "mixed": np.zeros((1, x.size))}
    out |= {name: np.zeros((3, x.size)) for name in ("albedo", "sun", "sky", "indirect", "diffuse")}

    rng = np.random.default_rng((seed, first))
    turn = rng.random((12, x.size), np.float32)
    order = [rng.permutation(samples) for _ in range(6)]
    for s in range(samples):
        # Six pairs of the plastic sequence, each in another order and turned at random in every pixel.
        steps = [order[k][s] * a % 1 for k in range(6) for a in (0.7548776662, 0.5698402910)]
        u = (turn + np.array(steps, np.float32)[:, None]) % 1
        d = camera_rays(x + u[0], y + u[1], width, height)[0].astype(np.float32)
        t, which = scene.trace(eye, d)
        p = eye + t * d
        normal, albedo = scene.surface(p, d, which)
        sky, indirect = sky_light(scene, p, normal, u[2:4]), np.zeros_like(p)
        out["mixed"] += (np.abs(t - t_centre) > 0.02 * t_centre) / samples
        out["albedo"] += albedo / samples
        out["sun"] += albedo * sun_light(scene, p, normal, u[4:6]) / samples
        d = bounce(normal, u[6:8])
        t, which = scene.trace(p + normal * OFF_SURFACE, d)
        seen = np.flatnonzero(which >= 0)  # the others leave through the window, whose light is counted above
        p, d = p.take(seen, 1) + d.take(seen, 1) * t[seen], d.take(seen, 1)
        normal, colour = scene.surface(p, d, which[seen])
        light = sky_light(scene, p, normal, u[8:10, seen]) + sun_light(scene, p, normal, u[10:12, seen])
        indirect[:, seen] = np.minimum(colour * (light + AMBIENT), 3)  # rare glints would show
        out["sky"] += sky / samples
        out["indirect"] += indirect / samples
        out["diffuse"] += albedo * (sky + indirect) / samples
    return {name: image.reshape(-1, len(rows), width).transpose(1, 2, 0) for name, image in out.items()}


def smooth(light: Array, depth: Array, normal: Array, passes: int) -> Array:
    """Average light over flat neighbourhoods: passes of an ever sparser 5x5 kernel that stops at edges."""
    taps = (0.375, 0.25, 0.0625)
    height, width = depth.shape[:2]
    for step in (2**i for i in range(passes)):
        border = [(2 * step, 2 * step)] * 2 + [(0, 0)]
        padded = [np.pad(image, border, mode="edge") for image in (light, depth, normal)]
        total, weights = np.zeros_like(light), np.zeros_like(depth)
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                y, x = (2 + dy) * step, (2 + dx) * step
                moved = [image[y : y + height, x : x + width] for image in padded]
                level = np.exp(-np.abs(moved[1] - depth) / (0.006 * step * depth))
                flat = np.maximum((moved[2] * normal).sum(2, keepdims=True), 0) ** 32
                weight = level * flat * taps[abs(dy)] * taps[abs(dx)]
                total += weight * moved[0]
                weights += weight
        light = total / weights
    return light


def develop(light: Array, exposure: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Turn linear light into a phone's picture: soft lens, vignette, sensor noise, tone curve, sRGB."""
    height, width, _ = light.shape
    y, x = np.linspace(-1, 1, height)[:, None, None], np.linspace(-1, 1, width)[None, :, None]
    light = _soften(light, 0.13) * exposure * (1 - 0.11 * (x * x + y * y))
    grain = _soften(rng.standard_normal(light.shape), 0.12) * np.sqrt(1.1e-4 * light + 2e-6)
    light = np.maximum(light + grain, 0)
    curve = light * (2.51 * light + 0.03) / (light * (2.43 * light + 0.59) + 0.14)  # Narkowicz's filmic fit
    shown = np.where(curve < 0.0031308, 12.92 * curve, 1.055 * np.maximum(curve, 1e-9) ** (1 / 2.4) - 0.055)
    return np.clip(shown * 255 + 0.5, 0, 255).astype(np.uint8)


def _soften(image: Array, side: float) -> Array:
    """Blur with weights (side, 1 - 2 side, side) along both axes."""
    for axis in (0, 1):
        pad = np.pad(image, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        before, after = (np.take(pad, range(k, k + image.shape[axis]), axis) for k in (0, 2))
        image = side * (before + after) + (1 - 2 * side) * image
    return image


def main() -> None:
    """Render, write ``guide.jpg`` and ``depth.png``, and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for guide.jpg and depth.png")
    parser.add_argument("--width", type=int, default=960, help="pixels; the scene suits 4:3")
    parser.add_argument("--height", type=int, default=720, help="pixels")
    parser.add_argument("--samples", type=int, default=16, help="light paths per pixel")
    parser.add_argument("--seed", type=int, default=0, help="seed of books, leaves and noise")
    parser.add_argument("--jobs", type=int, default=2, help="processes; the picture does not depend on them")
    parser.add_argument("--exposure", type=float, default=0.95, help="brightness")
    a = parser.parse_args()
    for name in ("width", "height", "samples", "jobs", "exposure"):
        if getattr(a, name) <= 0:
            parser.error(f"--{name} must be above 0; got {getattr(a, name)}")

    began = time.perf_counter()
    band = partial(render_rows, width=a.width, height=a.height, samples=a.samples, seed=a.seed)
    with ProcessPoolExecutor(a.jobs) as pool:
        bands = list(pool.map(band, range(0, a.height, ROWS)))
    parts = {name: np.concatenate([b[name] for b in bands]) for name in bands[0]}
    depth, normal = parts["depth"], parts["normal"]
    soft = smooth(parts["sky"], depth, normal, 2) + smooth(parts["indirect"], depth, normal, 5)
    # At depth edges the mean albedo and the smoothed light belong to different things: bright fringes.
    diffuse = np.where(parts["mixed"] > 0, parts["diffuse"], parts["albedo"] * soft)
    guide = develop(parts["sun"] + diffuse, a.exposure, np.random.default_rng(a.seed))
    millimetres = np.rint(depth[..., 0] * 1000).astype(np.uint16)

    a.out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(guide).save(a.out / "guide.jpg", quality=92, subsampling=0, optimize=True)
    Image.fromarray(millimetres).save(a.out / "depth.png", optimize=True)
    seconds = time.perf_counter() - began
    print(f"depth {millimetres.min()} to {millimetres.max()} mm, {seconds:.0f} s -> {a.out}")


if __name__ == "__main__":
    main()
