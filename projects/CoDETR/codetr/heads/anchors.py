"""Anchor grids of dense heads.

Letters: N images, L levels, Hl and Wl size of level l, A anchors of all levels together, in the
order of levels, rows, columns, anchors of a cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import Tensor

__all__ = ["CellAnchors", "inside_images", "octaves"]


class CellAnchors(DefaultAnchorGenerator):
    """Detectron2's anchors around the corners (j stride, i stride) of the cells, not their centres,
    those of a cell in the official order: all scales of the first ratio, then of the next one.

    Args:
        strides: of the levels, in pixels
        scales: of the anchors' sides, in strides
        ratios: height by width
        offset: of the points that anchors are around from the corners, in strides
    """

    def __init__(
        self,
        *,
        strides: Sequence[int],
        scales: Sequence[float] = (8.0,),
        ratios: Sequence[float] = (1.0,),
        offset: float = 0.0,
    ):
        super().__init__(
            sizes=[[scale * stride for scale in scales] for stride in strides],
            aspect_ratios=[list(ratios)],
            strides=list(strides),
            offset=offset,
        )

    def generate_cell_anchors(self, sizes=(), aspect_ratios=()) -> Tensor:
        """Return the anchors of one cell, ``(A, 4)``, around 0."""
        scale_major = super().generate_cell_anchors(sizes, aspect_ratios)
        return scale_major.view(len(sizes), len(aspect_ratios), 4).transpose(0, 1).reshape(-1, 4)

    @property
    def per_cell(self) -> int:
        """How many anchors a cell has."""
        return self.num_anchors[0]

    def of(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors of each level, ``(Hl Wl per_cell, 4)``, xyxy in pixels, float32;
        Detectron2 would make the grids on the host and wait until they are sent.
        """
        levels = []
        for each, stride, cell in zip(maps, self.strides, self.cell_anchors):
            y, x = (
                (torch.arange(size, device=each.device) + self.offset) * stride
                for size in each.shape[2:]
            )
            rows, columns = torch.meshgrid(y, x, indexing="ij")
            corners = torch.stack([columns, rows, columns, rows], dim=-1).view(-1, 1, 4)
            levels.append((corners + cell).flatten(0, 1))
        return levels

    def strides_of(self, levels: Sequence[Tensor]) -> Tensor:
        """Return the stride of each anchor of :meth:`of`, ``(A,)``."""
        return torch.cat([each.new_full((len(each),), s) for each, s in zip(levels, self.strides)])


def inside_images(
    maps: Sequence[Tensor], strides: Sequence[int], sizes: Tensor, *, per_cell: int = 1
) -> Tensor:
    """Return which anchors belong to cells that begin within their image, ``(N, A)``.

    Args:
        maps: ``(N, C, Hl, Wl)`` per level
        sizes: ``(N, 2)``, height and width of the images without padding
    """
    levels = []
    for each, stride in zip(maps, strides):
        rows, columns = (
            torch.arange(length, device=sizes.device) * stride < sizes[:, axis, None]
            for axis, length in enumerate(each.shape[2:])
        )
        cells = (rows[:, :, None] & columns[:, None]).flatten(1)
        levels.append(cells.repeat_interleave(per_cell, dim=1))
    return torch.cat(levels, dim=1)


def octaves(base: float, count: int) -> list[float]:
    """Return ``count`` scales per octave from ``base`` on."""
    return [base * math.pow(2, i / count) for i in range(count)]
