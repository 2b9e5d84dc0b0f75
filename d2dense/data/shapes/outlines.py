"""Outlines of the object classes and of clutter, as polygons around the origin.

An outline is a list of float arrays (P, 2) of xy points, y pointing down; several contours are
filled by the even-odd rule, so the second contour of a ring is its hole.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["CLASSES", "OUTLINES", "blob", "place", "stroke"]


def _polar(radius: np.ndarray | float, angle: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _regular(corners: int, radius: float = 1.0) -> np.ndarray:
    """Regular polygon with one corner at the top."""
    return _polar(radius, np.arange(corners) * 2 * np.pi / corners - np.pi / 2)


def _star() -> np.ndarray:
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return _polar(radius, np.arange(10) * np.pi / 5 - np.pi / 2)


def _cross(arm: float = 0.34) -> np.ndarray:
    a = arm
    points = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
    points += [(a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    return np.array(points, dtype=float)


def _crescent() -> np.ndarray:
    """Unit disc less a disc of radius 0.82 whose centre lies 0.55 to the right."""
    shift, radius = 0.55, 0.82
    meet = (1 + shift**2 - radius**2) / (2 * shift)
    outer = np.arccos(meet)
    inner = np.arctan2(np.sqrt(1 - meet**2), meet - shift)
    outside = _polar(1.0, np.linspace(outer, 2 * np.pi - outer, 40))
    inside = _polar(radius, np.linspace(2 * np.pi - inner, inner, 32)) + (shift, 0)
    return np.concatenate([outside, inside[1:-1]])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1) / 16


def _gear(teeth: int = 8) -> np.ndarray:
    """Four points per tooth: up, along the tip, down, along the root."""
    steps = np.array([-0.30, -0.17, 0.17, 0.30])
    angle = ((np.arange(teeth)[:, None] + steps) * 2 * np.pi / teeth).ravel()
    return _polar(np.tile([0.72, 1.0, 1.0, 0.72], teeth), angle)


def _arrow() -> np.ndarray:
    points = [
        (0, -1),
        (0.8, -0.1),
        (0.32, -0.1),
        (0.32, 1),
        (-0.32, 1),
        (-0.32, -0.1),
        (-0.8, -0.1),
    ]
    return np.array(points, dtype=float)


OUTLINES: dict[str, list[np.ndarray]] = {
    "disc": [_regular(48)],
    "ring": [_regular(48), _regular(36, 0.52)],
    "triangle": [_regular(3)],
    "square": [_polar(1.0, (np.arange(4) + 0.5) * np.pi / 2)],
    "star": [_star()],
    "cross": [_cross()],
    "crescent": [_crescent()],
    "heart": [_heart()],
    "gear": [_gear(), _regular(20, 0.26)],
    "arrow": [_arrow()],
}

CLASSES: tuple[str, ...] = tuple(OUTLINES)


_STEPS = np.linspace(-0.5, 0.5, 12)
_LINE = np.stack([_STEPS, np.zeros(12)], axis=1)
_BEND, _TWIST = 4 * _STEPS**2 - 1, 0.3 * np.sin(2 * np.pi * _STEPS)
_NEIGHBOURS = np.array([0, *range(12), 11])
_ANGLES = np.arange(24) * 2 * np.pi / 24


def blob(rng: np.random.Generator) -> list[np.ndarray]:
    """An irregular pebble- or leaf-like outline that belongs to no class."""
    radius = np.ones(24)
    for wave, depth, phase in zip((2, 3, 5), *rng.uniform(-1, 1, (2, 3))):
        radius += 0.5 / wave * depth * np.cos(wave * _ANGLES + np.pi * phase)
    return [_polar(radius, _ANGLES)]


def stroke(rng: np.random.Generator, *, length: float, width: float) -> list[np.ndarray]:
    """A bent stroke, such as a wire or a twig, in pixels around the origin."""
    bend, twist = rng.uniform(-0.25, 0.25, 2)
    line = _LINE + np.outer(_BEND * bend + _TWIST * twist, (0.0, 1.0))
    ends = line[_NEIGHBOURS]
    normal = (ends[2:] - ends[:-2])[:, ::-1] * (-1, 1)
    normal *= width / length / 2 / np.hypot(normal[:, :1], normal[:, 1:])
    return [np.concatenate([line + normal, (line - normal)[::-1]]) * length]


def place(
    outline: list[np.ndarray],
    *,
    extent: float,
    angle: float,
    aspect: float = 1.0,
    shear: float = 0.0,
    centre: tuple[float, float],
) -> list[np.ndarray]:
    """Stretch, shear, rotate, scale and move an outline, in this order.

    Args:
        outline: contours, each (P, 2).
        extent: longer side in pixels of the placed outline's box.
        angle: rotation in radians.
        aspect: factor of the width over the height.
        shear: horizontal shift per unit of height.
        centre: xy in pixels where the origin of the outline goes.
    """
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.array(
        [[cos * aspect, sin * aspect], [cos * shear - sin, sin * shear + cos]]
    )  # transposed, for rows of points
    outer = outline[0] @ matrix
    matrix *= extent / (outer.max(axis=0) - outer.min(axis=0)).max()
    return [contour @ matrix + centre for contour in outline]
