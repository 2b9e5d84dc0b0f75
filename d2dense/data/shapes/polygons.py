"""Exact outlines of pixel masks in the polygon form of COCO annotations.

The polygons follow the edges between pixels, on integer coordinates, and none of them has a hole,
so that ``pycocotools`` rasterises them back to the very mask they came from.
"""

from __future__ import annotations

import numpy as np

__all__ = ["mask_to_polygons"]


def mask_to_polygons(mask: np.ndarray, *, offset: tuple[int, int] = (0, 0)) -> list[list[int]]:
    """Return polygons ``[x0, y0, x1, y1, ...]`` whose rasterised union is exactly ``mask``.

    COCO polygons cannot have holes. A mask with a hole is cut in two by a vertical line through the
    hole, and the two parts are traced by themselves.

    Args:
        mask: (H, W) of any dtype, non-zero inside.
        offset: xy added to every point, for a mask cut out of a larger image.
    """
    polygons, stack = [], [(np.ascontiguousarray(mask != 0), *offset)]
    while stack:
        part, left, top = stack.pop()
        outer, holes = _boundary_curves(part)
        if holes:
            columns = [x for x, _ in holes[0]]
            cut = max((min(columns) + max(columns)) // 2, 1)
            stack += [(part[:, cut:], left + cut, top), (part[:, :cut], left, top)]
        else:
            polygons += [[v for x, y in curve for v in (x + left, y + top)] for curve in outer]
    return polygons


def _boundary_curves(mask: np.ndarray) -> tuple[list[list], list[list]]:
    """Trace the closed pixel-edge curves of a boolean mask (H, W): outer ones, and those of holes.

    A corner of the pixel grid is a vertex where the four pixels around it hold an odd number of
    mask pixels, and twice a vertex where two pixels touch only by that corner. Along a row of
    corners the vertices pair up, two by two, into the horizontal edges; along a column into the
    vertical edges. Following edges of alternating direction closes every curve.
    """
    height, width = mask.shape
    padded = np.zeros((height + 2, width + 2), dtype=bool)
    padded[1:-1, 1:-1] = mask
    a, b, c, d = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    odd = a ^ b ^ c ^ d
    touching = ~odd & (a ^ b) & (a ^ c)
    corners = np.flatnonzero(odd | touching)  # sorted by row, then by column
    corners = np.repeat(corners, 1 + touching.ravel()[corners])
    y, x = np.divmod(corners, width + 1)
    by_column = np.lexsort((y, x))
    vertical = np.empty_like(by_column)
    vertical[by_column] = by_column.reshape(-1, 2)[:, ::-1].ravel()
    # The first vertex met of a curve starts its topmost edge: the mask lies below that edge where
    # the curve is an outer one, and above it around a hole.
    below = d.ravel()[corners].tolist()
    points, vertical = list(zip(x.tolist(), y.tolist())), vertical.tolist()

    outer, holes = [], []
    seen = [False] * len(points)
    for start in range(0, len(points), 2):
        if seen[start]:
            continue
        vertex, curve = start, []
        while not seen[vertex]:
            partner = vertex ^ 1
            curve += (points[vertex], points[partner])
            seen[vertex] = seen[partner] = True
            vertex = vertical[partner]
        (outer if below[start] else holes).append(curve)
    return outer, holes
