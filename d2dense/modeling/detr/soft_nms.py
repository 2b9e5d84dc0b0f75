"""Soft suppression of overlapping detections (Bodla et al., 2017), linear, all images at once.

Letters: N images, M candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

__all__ = ["soft_nms"]


@torch.jit.script_if_tracing
def _decay(scores: Tensor, decay: Tensor, min_score: float) -> Tensor:
    """Return the scores after suppression, ``(N, M)``; 0 where nothing is left.

    The usual loop takes the best box, lowers those that overlap it, and so on. What a box loses
    depends on its neighbours alone, so every box that is better than all its neighbours that are
    left can be taken at once: there are as many rounds as the longest chain of neighbours.

    Args:
        scores: ``(N, M)``
        decay: ``(N, M, M)``, factor by which taking box i (row) lowers box j, 1 for no effect
    """
    left = scores >= min_score
    taken = torch.zeros_like(scores)
    while bool(left.any()):
        scores, left, taken = one_round(scores, left, taken, decay, min_score)
    return taken


def one_round(
    scores: Tensor, left: Tensor, taken: Tensor, decay: Tensor, min_score: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``scores``, ``left`` (bool, not taken or dropped yet) and ``taken`` (the scores of
    those that are taken), all ``(N, M)``, after all boxes are taken that are the best of their
    neighbours.
    """
    number = torch.arange(scores.shape[1], device=scores.device)
    before = (scores[:, None, :] > scores[:, :, None]) | (
        (scores[:, None, :] == scores[:, :, None]) & (number[None, :] < number[:, None])
    )
    beaten = ((decay < 1) & before & left[:, None, :]).any(dim=2)
    best = left & ~beaten
    taken = torch.where(best, scores, taken)
    factors = torch.where(best[:, :, None], decay, torch.ones_like(decay)).prod(dim=1)
    left = left & ~best
    scores = torch.where(left, scores * factors, scores)
    return scores, left & (scores >= min_score), taken


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    *,
    iou: float = 0.8,
    min_score: float = 1e-3,
    by_offset: bool = False,
) -> Tensor:
    """Return new scores ``(N, M)``: each box that is kept multiplies those of its class that
    overlap it by at least ``iou`` and have a lower score by 1 - IoU; 0 below ``min_score``.

    Args:
        boxes: ``(N, M, 4)``, xyxy in pixels, not negative
        scores, classes: ``(N, M)``
        by_offset: keep classes apart as MMDetection does, by moving each to a place of its own,
            where single precision rounds coordinates
    """
    places = boxes
    if by_offset:
        places = boxes + (classes * (boxes.flatten(1).amax(dim=1)[:, None] + 1))[..., None]
    overlap = box_iou(places, places)
    others = ~torch.eye(boxes.shape[1], dtype=torch.bool, device=boxes.device)
    near = (overlap >= iou) & (classes[:, None, :] == classes[:, :, None]) & others
    decay = torch.where(near, 1 - overlap, torch.ones_like(overlap))
    return _decay(scores, decay, min_score)
