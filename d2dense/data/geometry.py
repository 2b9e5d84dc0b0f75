"""Annotations under transforms: boxes, polygons and masks that stay on the same pixels as the
image.

Coordinates are absolute xy in pixels, with pixel (0, 0) covering [0, 1] x [0, 1]. Polygons are (P,
2) float arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from fvcore.transforms.transform import CropTransform, PadTransform, Transform, TransformList

__all__ = ["clip_boxes", "clip_polygon", "polygon_area", "transform_mask", "transform_polygons"]

# Clipped pieces below this area (square pixels) are rounding noise, not objects.
_MIN_AREA = 1e-6


def clip_boxes(boxes: np.ndarray, height: float, width: float) -> np.ndarray:
    """Return absolute xyxy ``boxes`` (N, 4) limited to an image of ``height`` and ``width`` pixels,
    from edge to edge.
    """
    return np.clip(boxes, 0, [width, height, width, height])


def polygon_area(polygon: np.ndarray) -> float:
    """Return the absolute area of a simple polygon (P, 2) by the shoelace formula."""
    x, y = polygon[:, 0], polygon[:, 1]
    inner = x[:-1] @ y[1:] - y[:-1] @ x[1:]
    return 0.5 * abs(float(inner + x[-1] * y[0] - y[-1] * x[0]))


def transform_polygons(
    transforms: TransformList | Transform, polygons: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Return ``polygons`` after ``transforms``; crops cut them, so their number may change.

    fvcore's own crop of polygons needs shapely; this one needs nothing.
    """
    result = [np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in polygons]
    for step in _steps(transforms):
        if isinstance(step, CropTransform):
            moved = [step.apply_coords(polygon) for polygon in result]
            result = [piece for p in moved for piece in clip_polygon(p, step.h, step.w)]
        else:
            result = step.apply_polygons(result)
    return result


def transform_mask(transforms: TransformList | Transform, mask: np.ndarray) -> np.ndarray:
    """Return a binary instance mask (H, W) uint8 after ``transforms``; padding is outside the
    object.

    A PadTransform fills label maps with the ignore label, which would count as object in a binary
    mask.
    """
    for step in _steps(transforms):
        if isinstance(step, PadTransform):
            mask = np.pad(mask, ((step.y0, step.y1), (step.x0, step.x1)))
        else:
            mask = step.apply_segmentation(mask)
    return mask


def _steps(transforms: TransformList | Transform) -> Iterator[Transform]:
    """Yield the single transforms of a possibly nested list."""
    if isinstance(transforms, TransformList):
        for transform in transforms.transforms:
            yield from _steps(transform)
    else:
        yield transforms


def clip_polygon(polygon: np.ndarray, height: float, width: float) -> list[np.ndarray]:
    """Cut a polygon (P, 2) with the rectangle [0, width] x [0, height].

    Returns:
        The pieces inside, in the same rotation sense. A concave polygon may fall apart into
        several.
    """
    if ((polygon >= 0) & (polygon <= (width, height))).all():
        return [polygon]  # the usual case
    pieces = [polygon]
    for axis, limit, sign in ((0, 0.0, 1), (0, width, -1), (1, 0.0, 1), (1, height, -1)):
        pieces = [
            cut
            for piece in pieces
            for cut in _cut(piece, sign * (piece[:, axis] - limit), 1 - axis)
        ]
    return [piece for piece in pieces if len(piece) >= 3 and polygon_area(piece) > _MIN_AREA]


def _cut(polygon: np.ndarray, depth: np.ndarray, along: int) -> list[np.ndarray]:
    """Cut a polygon (P, 2) with a half-plane; ``depth`` (P,) is the distance of each corner into
    it.

    The border line crosses the polygon at an even number of points. Sorted along the line (axis
    ``along``), each pair of neighbours bounds a stretch of the polygon's interior, so the chain of
    corners that leaves the half-plane at one point continues with the chain that enters it at the
    other.
    """
    inside = depth >= 0
    if inside.all():
        return [polygon]
    if not inside.any():
        return []
    chains = _inside_chains(polygon, depth, inside)
    crossings = sorted(
        [(chain[0, along], index, False) for index, chain in enumerate(chains)]
        + [(chain[-1, along], index, True) for index, chain in enumerate(chains)]
    )
    following = {}
    for first, second in zip(crossings[::2], crossings[1::2]):
        if first[2] == second[2]:  # the polygon crosses itself: keep its area, in one piece
            return [np.concatenate(chains)]
        leaves, enters = (first, second) if first[2] else (second, first)
        following[leaves[1]] = enters[1]
    pieces = []
    while following:
        index, loop = next(iter(following)), []
        while index in following:
            loop.append(chains[index])
            index = following.pop(index)
        pieces.append(np.concatenate(loop))
    return pieces


def _inside_chains(polygon: np.ndarray, depth: np.ndarray, inside: np.ndarray) -> list[np.ndarray]:
    """Return runs of consecutive inside corners, each with the border points where it enters and
    leaves.
    """
    start = int(np.argmin(inside))  # an outside corner, so that no run wraps around
    points, depth = np.roll(polygon, -start, axis=0), np.roll(depth, -start)
    inside = np.append(np.roll(inside, -start), False).astype(np.int8)
    change = np.diff(inside)
    count = len(points)

    def crossing(outside: int, within: int) -> np.ndarray:
        share = depth[within] / (depth[within] - depth[outside])
        return points[within] + share * (points[outside] - points[within])

    return [
        np.concatenate(
            [
                crossing(enter, enter + 1)[None],
                points[enter + 1 : leave + 1],
                crossing((leave + 1) % count, leave)[None],
            ]
        )
        for enter, leave in zip(np.flatnonzero(change == 1), np.flatnonzero(change == -1))
    ]
