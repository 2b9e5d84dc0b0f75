"""Anchors go to the objects that they overlap most.

Letters: N images, A anchors, G most objects in an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .objects import Objects, chunks, paired_iou

__all__ = ["assign_by_iou"]


@torch.no_grad()
def assign_by_iou(
    anchors: Tensor,
    inside: Tensor,
    objects: Objects,
    *,
    positive: float = 0.5,
    negative: float = 0.4,
    least: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return each anchor's object, ``(N, A)``, and its kind, ``(N, A)`` int8: 1 positive, 0
    negative, -1 ignored.

    Besides the anchors of high IoU, those become positive that overlap an object most (all of
    equal IoU do), if it is at least ``least`` and above 0. They go to that object, of several to
    the last one, even if they overlap another one more.

    Args:
        anchors: ``(A, 4)``, xyxy in pixels
        inside: ``(N, A)``, False for anchors that are ignored and that no object gets
        positive: least IoU of positive anchors
        negative: IoU below which anchors are negative; those in between are ignored
        least: IoU with their best anchors from which on objects get them
    """
    best = anchors.new_zeros(inside.shape)
    index = torch.zeros_like(inside, dtype=torch.int64)
    owner = torch.full_like(index, -1)
    for part in chunks(objects, 4 * len(anchors)):
        usable = inside[:, None] & objects.there[:, part, None]
        iou = paired_iou(objects.boxes[:, part, None], anchors).masked_fill(~usable, 0.0)
        value, row = iou.max(dim=1)
        index = torch.where(value > best, row + part.start, index)
        best = torch.maximum(value, best)
        top = iou.amax(dim=2, keepdim=True)
        chosen = (iou == top) & (top > 0) & (top >= least)
        numbers = torch.arange(part.start, part.start + iou.shape[1], device=iou.device)[:, None]
        owner = torch.maximum(owner, numbers.masked_fill(~chosen, -1).amax(dim=1))
    kinds = torch.full_like(index, -1, dtype=torch.int8)
    kinds = kinds.masked_fill(best < negative, 0).masked_fill(best >= positive, 1)
    kinds = kinds.masked_fill(owner >= 0, 1).masked_fill(~inside, -1)
    return torch.where(owner >= 0, owner, index), kinds
