"""Analytic primitives in a tree of boxes, traced with numpy: the geometry behind ``render_demo.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # rays and points are (3, n); float32 for colour, float64 for depth
Paint = Callable[[Array], Array]  # points (3, n) in metres -> albedo (3, n)
Point = Sequence[float]


class Primitive:
    """A shape with a paint; ``hit`` returns the distance along unit rays, infinity where there is none."""

    paint: Paint
    low: Array
    high: Array

    def hit(self, o: Array, d: Array) -> Array:
        """Return (n,) distances for origins ``o`` and directions ``d``, (3, n) each."""
        raise NotImplementedError

    def normal(self, p: Array) -> Array:
        """Return unit normals (3, n) at surface points, of either sign."""
        raise NotImplementedError


def vector(p: Point | Array) -> Array:
    """Return a float32 column (3, 1): wider rays keep their own precision in sums with it."""
    return np.asarray(p, np.float32).reshape(3, 1)


def dot(a: Array, b: Array) -> Array:
    """Return a . b over the first axis, several times faster than a numpy sum over three."""
    out: Array = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return out


def unit(v: Array) -> Array:
    """Return vectors (3, n) scaled to length 1."""
    return v / np.sqrt(dot(v, v) + 1e-20)


def _cross(a: Array, b: Array) -> Array:
    return np.stack([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])


def _slabs(first: Array, second: Array) -> tuple[Array, Array]:
    """Where rays enter and leave a box, from the distances (3, n) to its two faces on each axis."""
    near, far = np.minimum(first, second), np.maximum(first, second)
    return np.maximum(np.maximum(near[0], near[1]), near[2]), np.minimum(np.minimum(far[0], far[1]), far[2])


def _nearest_positive(*distances: Array) -> Array:
    out: Array = np.min([np.where(t > 1e-5, t, np.inf) for t in distances], axis=0)
    return out


class Box(Primitive):
    """A box between two corners, turned by ``yaw`` radians about its own vertical axis."""

    def __init__(self, low: Point, high: Point, paint: Paint, yaw: float = 0.0) -> None:
        self.paint, self.centre = paint, (vector(low) + vector(high)) / 2
        self.half = (vector(high) - vector(low)) / 2
        self.cos, self.sin = math.cos(yaw), math.sin(yaw)
        x, y, z = (float(h) for h in self.half[:, 0])
        reach = vector((abs(self.cos) * x + abs(self.sin) * z, y, abs(self.sin) * x + abs(self.cos) * z))
        self.low, self.high = self.centre - reach, self.centre + reach

    def _turn(self, v: Array, sin: float) -> Array:
        return np.stack([self.cos * v[0] - sin * v[2], v[1], sin * v[0] + self.cos * v[2]])

    def hit(self, o: Array, d: Array) -> Array:  # noqa: D102
        d = self._turn(d, self.sin)
        step = 1 / np.where(np.abs(d) < 1e-9, 1e-9, d)
        middle, reach = -self._turn(o - self.centre, self.sin) * step, self.half * np.abs(step)
        near, far = _slabs(middle - reach, middle + reach)
        return np.where((near <= far) & (near > 1e-5), near, np.inf)

    def normal(self, p: Array) -> Array:  # noqa: D102
        q = self._turn(p - self.centre, self.sin)
        face = np.argmin(np.abs(np.abs(q) - self.half), axis=0)
        return self._turn(np.where(np.arange(3)[:, None] == face, np.sign(q), 0).astype(p.dtype), -self.sin)


class Ellipsoid(Primitive):
    """An ellipsoid with axes along x, y, z."""

    def __init__(self, centre: Point, radii: Point, paint: Paint) -> None:
        self.paint, self.centre, self.radii = paint, vector(centre), vector(radii)
        self.low, self.high = self.centre - self.radii, self.centre + self.radii

    def hit(self, o: Array, d: Array) -> Array:  # noqa: D102
        o, d = (o - self.centre) / self.radii, d / self.radii
        a = dot(d, d)
        t = -dot(o, d) / a
        miss = o + t * d  # from the point of closest approach: no cancellation for small far spheres
        root = np.sqrt(np.maximum(1 - dot(miss, miss), 0) / a)
        return np.where((root > 0) & (t > root), t - root, np.inf)

    def normal(self, p: Array) -> Array:  # noqa: D102
        return unit((p - self.centre) / self.radii**2)


class Capsule(Primitive):
    """A round rod from ``a`` to ``b``, all points within ``radius`` of the segment."""

    def __init__(self, a: Point | Array, b: Point | Array, radius: float, paint: Paint) -> None:
        self.paint, self.a, self.radius = paint, vector(a), radius
        axis = vector(b) - self.a
        self.length = float(np.sqrt((axis * axis).sum())) + 1e-9
        self.axis = axis / np.float32(self.length)
        self.low, self.high = np.minimum(self.a, vector(b)) - radius, np.maximum(self.a, vector(b)) + radius

    def hit(self, o: Array, d: Array) -> Array:  # noqa: D102
        o = o - self.a
        along, speed = dot(o, self.axis), dot(d, self.axis)
        across, drift = o - along * self.axis, d - speed * self.axis
        a = np.maximum(dot(drift, drift), 1e-12)
        t = -dot(across, drift) / a
        miss = across + t * drift
        gap = self.radius**2 - dot(miss, miss)
        t = t - np.sqrt(np.maximum(gap, 0) / a)
        y = along + t * speed
        end = o - self.axis * np.where(y < 0, 0, self.length).astype(o.dtype)  # the rounded end this ray may hit
        t_end = -dot(end, d)
        miss = end + t_end * d
        gap_end = self.radius**2 - dot(miss, miss)
        body = (y >= 0) & (y <= self.length)
        t = np.where(body, t, t_end - np.sqrt(np.maximum(gap_end, 0)))
        return np.where((gap > 0) & (body | (gap_end > 0)) & (t > 1e-5), t, np.inf)

    def normal(self, p: Array) -> Array:  # noqa: D102
        q = p - self.a
        return unit(q - self.axis * np.clip(dot(q, self.axis), 0, self.length))


class Frustum(Primitive):
    """An open upright cone section about ``(x, z)``: radius ``r0`` at height ``y0`` to ``r1`` at ``y1``."""

    def __init__(self, x: float, z: float, y0: float, r0: float, y1: float, r1: float, paint: Paint) -> None:
        self.paint, self.x, self.z, self.y0, self.y1, self.r0 = paint, x, z, y0, y1, r0
        self.slope, reach = (r1 - r0) / (y1 - y0), max(r0, r1)
        self.low, self.high = vector((x - reach, y0, z - reach)), vector((x + reach, y1, z + reach))

    def hit(self, o: Array, d: Array) -> Array:  # noqa: D102
        x, z, r = o[0] - self.x, o[2] - self.z, self.r0 + self.slope * (o[1] - self.y0)
        growth = self.slope * d[1]
        a = d[0] ** 2 + d[2] ** 2 - growth**2
        a = np.where(np.abs(a) < 1e-7, 1e-7, a)
        b, c = x * d[0] + z * d[2] - r * growth, x * x + z * z - r * r
        root = np.sqrt(np.maximum(b * b - a * c, 0))
        found = [(-b - root) / a, (-b + root) / a]
        for t in found:
            y = o[1] + t * d[1]
            t[(b * b < a * c) | (y < self.y0) | (y > self.y1)] = np.inf
        return _nearest_positive(*found)

    def normal(self, p: Array) -> Array:  # noqa: D102
        x, z = p[0] - self.x, p[2] - self.z
        return unit(np.stack([x, -self.slope * np.sqrt(x * x + z * z), z]))


class Disc(Primitive):
    """A level disc."""

    def __init__(self, centre: Point, radius: float, paint: Paint) -> None:
        self.paint, self.centre, self.radius = paint, vector(centre), radius
        reach = vector((radius, 1e-4, radius))
        self.low, self.high = self.centre - reach, self.centre + reach

    def hit(self, o: Array, d: Array) -> Array:  # noqa: D102
        q = o - self.centre
        t = -q[1] / np.where(np.abs(d[1]) < 1e-9, 1e-9, d[1])
        inside = (q[0] + t * d[0]) ** 2 + (q[2] + t * d[2]) ** 2 < self.radius**2
        return np.where(inside & (t > 1e-5), t, np.inf)

    def normal(self, p: Array) -> Array:  # noqa: D102
        return np.broadcast_to(np.array([[0], [1], [0]], p.dtype), p.shape)


class Triangle(Primitive):
    """A thin triangle, seen from both sides."""

    def __init__(self, a: Array, b: Array, c: Array, paint: Paint) -> None:
        self.paint, self.a = paint, vector(a)
        self.ab, self.ac = vector(b) - self.a, vector(c) - self.a
        self.cross = _cross(self.ab, self.ac)
        corners = np.concatenate([vector(a), vector(b), vector(c)], axis=1)
        self.low, self.high = corners.min(1, keepdims=True) - 1e-4, corners.max(1, keepdims=True) + 1e-4

    def hit(self, o: Array, d: Array) -> Array:  # noqa: D102
        det = -dot(d, self.cross)
        step = 1 / np.where(np.abs(det) < 1e-12, 1e-12, det)
        q = o - self.a
        turn = _cross(q, d)
        u, v, t = dot(self.ac, turn) * step, -dot(self.ab, turn) * step, dot(q, self.cross) * step
        return np.where((u >= 0) & (v >= 0) & (u + v <= 1) & (t > 1e-5), t, np.inf)

    def normal(self, p: Array) -> Array:  # noqa: D102
        return np.broadcast_to(unit(self.cross).astype(p.dtype), p.shape)


def tube(points: Iterable[Point | Array], radius: float, paint: Paint) -> list[Primitive]:
    """Rods along a polyline."""
    return [Capsule(a, b, radius, paint) for a, b in pairwise(points)]


def lathe(x: float, z: float, profile: Sequence[tuple[float, float]], paint: Paint) -> list[Primitive]:
    """Frusta about an upright axis through (height, radius) pairs of growing height."""
    return [Frustum(x, z, y0, r0, y1, r1, paint) for (y0, r0), (y1, r1) in pairwise(profile)]


def circle(centre: Point | Array, radius: float, count: int, across: Point, up: Point = (0, 1, 0)) -> list[Array]:
    """``count`` + 1 points around a circle, the first again last."""
    angles = np.linspace(0, 2 * math.pi, count + 1)
    return [vector(centre) + radius * (math.cos(a) * vector(across) + math.sin(a) * vector(up)) for a in angles]


def blade(
    root: Point | Array,
    heading: float,
    rise: float,
    length: float,
    width: float,
    droop: float,
    paint: Paint,
    pieces: int = 7,
) -> list[Primitive]:
    """An arching leaf of thin triangles: starts at angle ``rise`` and bends down by ``droop`` radians."""
    side = vector((-math.sin(heading), 0, math.cos(heading)))
    middle, edges = vector(root), []
    for i in range(pieces + 1):
        half = width / 2 * math.sin(math.pi * min(1.0, 0.12 + 0.88 * i / pieces)) ** 0.7 if i < pieces else 0.0
        edges.append((middle - half * side, middle + half * side))
        angle = rise - droop * (i / pieces) ** 1.2
        ahead = (math.cos(angle) * math.cos(heading), math.sin(angle), math.cos(angle) * math.sin(heading))
        middle = middle + length / pieces * vector(ahead)
    triangles: list[Primitive] = []
    for (a, b), (c, d) in pairwise(edges):
        triangles += [Triangle(a, b, c, paint), Triangle(b, d, c, paint)]
    return triangles


@dataclass
class Node:
    """A box around two subtrees, or around a few primitives given by number."""

    low: Array
    high: Array
    children: tuple[Node, Node] | None
    members: list[int]


class Scene:
    """Primitives in a tree of boxes, split at the median along the widest axis."""

    def __init__(self, primitives: list[Primitive]) -> None:
        self.primitives = primitives
        self.root = self._build(list(range(len(primitives))))

    def _build(self, members: list[int]) -> Node:
        lows = np.concatenate([self.primitives[i].low for i in members], axis=1)
        highs = np.concatenate([self.primitives[i].high for i in members], axis=1)
        low, high = lows.min(1, keepdims=True), highs.max(1, keepdims=True)
        if len(members) <= 2:
            return Node(low, high, None, members)
        middles = lows + highs
        ranked = np.argsort(middles[np.argmax(np.ptp(middles, axis=1))], kind="stable")
        half = len(members) // 2
        halves = [members[i] for i in ranked[:half]], [members[i] for i in ranked[half:]]
        return Node(low, high, (self._build(halves[0]), self._build(halves[1])), [])

    def trace(self, o: Array, d: Array, limit: Array | None = None) -> tuple[Array, Array]:
        """Find the first hits of rays.

        Args:
            o: (3, n) origins.
            d: (3, n) unit directions.
            limit: (n,) distances. If given, only whether something is nearer matters: such rays get t = 0.

        Returns:
            t: (n,) distances, infinity (or the limit) where nothing is hit, and (n,) primitive numbers.
        """
        t = np.full(o.shape[1], np.inf, o.dtype) if limit is None else limit.copy()
        which = np.full(o.shape[1], -1)
        step = 1 / np.where(np.abs(d) < 1e-9, 1e-9, d)
        stack = [(self.root, np.arange(o.shape[1]))]
        while stack:
            node, rays = stack.pop()
            inverse, start = step.take(rays, 1), o.take(rays, 1)
            near, far = _slabs((node.low - start) * inverse, (node.high - start) * inverse)
            rays = rays[(near <= far) & (far > 0) & (near < t[rays])]
            if rays.size and node.children:
                stack += [(child, rays) for child in node.children]
            elif rays.size:
                for i in node.members:
                    found = self.primitives[i].hit(o.take(rays, 1), d.take(rays, 1))
                    nearer = found < t[rays]
                    t[rays[nearer]] = found[nearer] if limit is None else 0
                    which[rays[nearer]] = i
        return t, which

    def surface(self, p: Array, d: Array, which: Array) -> tuple[Array, Array]:
        """Return normals facing the rays and albedo, (3, n) each, of points on primitives ``which``."""
        normal, albedo = np.zeros_like(p), np.zeros_like(p)
        order = np.argsort(which, kind="stable")
        for rays in np.split(order, np.flatnonzero(np.diff(which[order])) + 1):
            if rays.size and which[rays[0]] >= 0:
                primitive = self.primitives[which[rays[0]]]
                normal[:, rays], albedo[:, rays] = primitive.normal(p[:, rays]), primitive.paint(p[:, rays])
        return np.where(dot(normal, d) > 0, -normal, normal), albedo
