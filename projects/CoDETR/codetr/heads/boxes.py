"""Geometry of boxes, and the box coder of all heads that move anchors or proposals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from d2dense.modeling.box_regression import encode

__all__ = ["BoxCoder", "boxes_around", "centres", "clip", "sides"]


def clip(boxes: Tensor, limits: Tensor) -> Tensor:
    """Clip xyxy boxes ``(..., 4)`` to (width, height, width, height) ``(..., 4)``."""
    return torch.minimum(boxes.clamp(min=0), limits)


def centres(boxes: Tensor) -> Tensor:
    """Return the centres ``(..., 2)``, x and y, of xyxy boxes ``(..., 4)``."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def sides(points: Tensor, boxes: Tensor) -> Tensor:
    """Return how far left, top, right and bottom of xyxy ``boxes`` ``(..., 4)`` are from ``points``
    ``(..., 2)`` inside, ``(..., 4)``; below 0 where a point is outside.
    """
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def boxes_around(points: Tensor, distances: Tensor) -> Tensor:
    """Return the xyxy boxes ``(..., 4)`` whose :func:`sides` are at ``distances`` ``(..., 4)`` from
    ``points`` ``(..., 2)``.
    """
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


class BoxCoder:
    """Boxes as shifts and log scales relative to other boxes, divided by ``stds``.

    Unlike Detectron2's, it limits log scales on both sides when it decodes.

    Args:
        stds: of x, y, width, height
        max_scale: largest factor, and its inverse the smallest, of width and height
    """

    def __init__(self, *, stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0), max_scale: float = 62.5):
        self.stds = tuple(float(std) for std in stds)
        self.max_log_scale = math.log(max_scale)

    def encode(self, boxes: Tensor, targets: Tensor) -> Tensor:
        """Return the deltas ``(..., 4)`` that move xyxy ``boxes`` to ``targets``."""
        return encode(boxes, targets, [1 / std for std in self.stds])

    def decode(self, boxes: Tensor, deltas: Tensor) -> Tensor:
        """Return xyxy ``boxes`` moved by ``deltas``, both ``(..., 4)``; float32, not clipped."""
        stds = torch.tensor(self.stds, dtype=torch.float32)
        deltas = deltas.float() * stds.to(deltas.device, non_blocking=True)
        size = boxes[..., 2:] - boxes[..., :2]
        centre = boxes[..., :2] + 0.5 * size + size * deltas[..., :2]
        half = 0.5 * size * deltas[..., 2:].clamp(-self.max_log_scale, self.max_log_scale).exp()
        return torch.cat([centre - half, centre + half], dim=-1)
