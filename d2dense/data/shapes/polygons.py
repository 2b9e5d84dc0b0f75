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
        cycles = _boundary_cycles(part)
        hole = next((cycle for cycle in cycles if _signed_area(cycle) < 0), None)
        if hole is None:
            polygons += [[v for x, y in cycle for v in (x + left, y + top)] for cycle in cycles]
        else:
            columns = [x for x, _ in hole]
            cut = max((min(columns) + max(columns)) // 2, 1)
            stack += [(part[:, cut:], left + cut, top), (part[:, :cut], left, top)]
    return polygons


def _boundary_cycles(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Trace the pixel-edge curves of a boolean mask (H, W); outer ones clockwise on the screen.

    A corner of the pixel grid is a vertex where the four pixels around it hold an odd number of
    mask pixels, and twice a vertex where two pixels touch only by that corner. Along a row of
    corners the vertices pair up, two by two, into the horizontal edges; along a column into the
    vertical edges. Following edges of alternating direction closes every curve.
    """
    height, width = mask.shape
    padded = np.zeros((height + 2, width + 2), dtype=bool)
    padded[1:-1, 1:-1] = mask
    a, b, c, d = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    touching = (a == d) & (b == c) & (a != b)
    copies = ((a ^ b ^ c ^ d) + 2 * touching).ravel()
    corners = np.repeat(np.arange(copies.size), copies)  # sorted by row, then by column
    y, x = np.divmod(corners, width + 1)
    by_column = np.lexsort((y, x))
    vertical = np.empty_like(by_column)
    vertical[by_column] = by_column.reshape(-1, 2)[:, ::-1].ravel()
    x, y, vertical = x.tolist(), y.tolist(), vertical.tolist()

    cycles, seen = [], [False] * len(x)
    for start in range(0, len(x), 2):
        if seen[start]:
            continue
        # The first vertex is the topmost, leftmost one of its curve: its edge to the right is
        # walked eastwards where the mask lies below it, westwards where it lies above, which tells
        # the outside from a hole.
        vertex = (
            start if mask[y[start] : y[start] + 1, x[start] : x[start] + 1].any() else start + 1
        )
        cycle = []
        while not seen[vertex]:
            partner = vertex ^ 1
            cycle += [(x[vertex], y[vertex]), (x[partner], y[partner])]
            seen[vertex] = seen[partner] = True
            vertex = vertical[partner]
        cycles.append(cycle)
    return cycles


def _signed_area(cycle: list[tuple[int, int]]) -> int:
    """Area inside a curve, negative for a hole, from its horizontal edges (every other one)."""
    return sum((x0 - x1) * y for (x0, y), (x1, _) in zip(cycle[::2], cycle[1::2]))
