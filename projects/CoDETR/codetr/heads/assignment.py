"""Which object each anchor belongs to, for all images at once.

Letters: N images, G most objects in an image, A anchors, g objects of a slice, c candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .boxes import centres, sides
from .objects import Objects, chunks, paired_iou

__all__ = ["ATSSAssigner", "Assignment", "IoUAssigner"]


class Assignment(NamedTuple):
    """Anchors that are neither positive nor negative are ignored.

    Attributes:
        matched: ``(N, A)``, the object's row; 0 where not positive.
        positive, negative: ``(N, A)``.
    """

    matched: Tensor
    positive: Tensor
    negative: Tensor

    def labels(self, objects: Objects, num_classes: int) -> Tensor:
        """Return the classes ``(N, A)``, ``num_classes`` of negatives, -1 of the others."""
        classes = objects.classes.gather(1, self.matched)
        classes = classes.masked_fill(~self.positive, -1)
        return classes.masked_fill(self.negative, num_classes)

    def targets(self, objects: Objects, others: Tensor) -> Tensor:
        """Return the objects' boxes ``(N, A, 4)``, those of ``others`` where not positive."""
        boxes = objects.boxes.gather(1, self.matched[..., None].expand(-1, -1, 4))
        return torch.where(self.positive[..., None], boxes, others)


class IoUAssigner:
    """Positive and negative by the largest IoU; each object may also claim the anchors that it
    overlaps most, which are its own then whatever else they overlap (of several the last one).

    Args:
        positive, negative: positives reach the one, negatives stay below the other
        claim: least IoU, above 0 in any case, of what an object can claim; None: they claim nothing
    """

    def __init__(self, *, positive: float, negative: float, claim: float | None = None):
        self.positive, self.negative, self.claim = positive, negative, claim

    @torch.no_grad()
    def __call__(self, anchors: Tensor, inside: Tensor, objects: Objects) -> Assignment:
        """Assign the anchors.

        Args:
            anchors: ``(A, 4)``, or ``(N, A, 4)``, xyxy in pixels
            inside: ``(N, A)``, False for anchors that are ignored
        """
        best = torch.full(inside.shape, -1.0, device=inside.device)
        matched = torch.zeros_like(inside, dtype=torch.int64)
        owner = torch.full_like(matched, -1)
        for part in chunks(objects, inside.shape[1]):
            boxes, there = objects.boxes[:, part, None], objects.there[:, part, None]
            iou = paired_iou(boxes, anchors.unsqueeze(-3))  # (N, g, A)
            iou = iou.masked_fill(~(there & inside[:, None]), -1.0)
            value, row = iou.max(dim=1)
            matched = torch.where(value > best, row + part.start, matched)
            best = torch.maximum(value, best)
            if self.claim is not None:
                most = iou.amax(dim=2, keepdim=True)
                claimed = (iou == most) & (most >= self.claim) & (iou > 0)
                number = torch.arange(iou.shape[1], device=iou.device)[:, None] + part.start
                owner = torch.maximum(owner, number.where(claimed, -1).amax(dim=1))
        claimed = owner >= 0
        positive = (best >= self.positive) | claimed
        return Assignment(
            matched=torch.where(claimed, owner, matched).where(positive, 0),
            positive=positive,
            negative=inside & ~positive & (best < self.negative),
        )


class ATSSAssigner:
    """Adaptive training sample selection: of the anchors closest to an object in each level, those
    with an IoU of at least mean plus (unbiased) standard deviation, whose centres are inside it.
    An anchor of several objects goes to the one with the highest IoU.

    Args:
        candidates: closest anchors per level
        margin: how far inside the object centres are, in pixels
    """

    def __init__(self, *, candidates: int = 9, margin: float = 0.01):
        self.candidates, self.margin = candidates, margin

    @torch.no_grad()
    def __call__(self, anchors: Sequence[Tensor], inside: Tensor, objects: Objects) -> Assignment:
        """Assign the anchors.

        Args:
            anchors: ``(Al, 4)`` per level, A in total, xyxy in pixels
            inside: ``(N, A)``, False for anchors that are ignored
        """
        best = torch.full(inside.shape, -1.0, device=inside.device)
        matched = torch.zeros_like(inside, dtype=torch.int64)
        nobody = objects.there.shape[1]
        for part in chunks(objects, inside.shape[1]):
            index, iou, positive = self._select(anchors, inside, objects, part)
            number = torch.arange(iou.shape[1], device=iou.device)[:, None] + part.start
            index = index.flatten(1)
            flat = iou.where(positive, -1.0).flatten(1)
            now = best.scatter_reduce(1, index, flat, "amax")
            wins = positive.flatten(1) & (flat == now.gather(1, index))
            number = number.expand_as(iou).flatten(1).where(wins, nobody)
            row = torch.full_like(matched, nobody).scatter_reduce(1, index, number, "amin")
            matched = torch.where(now > best, row, matched)
            best = now
        positive = best >= 0
        return Assignment(matched=matched, positive=positive, negative=inside & ~positive)

    def _select(
        self, anchors: Sequence[Tensor], inside: Tensor, objects: Objects, part: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the candidates of some objects, their IoUs, and which are positive, ``(N, g, c)``
        each.
        """
        boxes, there = objects.boxes[:, part], objects.there[:, part, None]
        middle = centres(boxes)
        chosen, valid, first = [], [], 0
        for level in anchors:
            distance = (centres(level) - middle[:, :, None]).pow(2).sum(dim=-1).sqrt()  # (N, g, Al)
            allowed = inside[:, None, first : first + len(level)]
            distance = distance.masked_fill(~allowed, torch.inf)
            count = min(self.candidates, len(level))
            distance, index = distance.topk(count, dim=2, largest=False)
            chosen.append(index + first)
            valid.append(distance.isfinite() & there)
            first += len(level)
        index, valid = torch.cat(chosen, dim=2), torch.cat(valid, dim=2)
        ours = torch.cat(list(anchors))[index]  # (N, g, c, 4)
        iou = paired_iou(ours, boxes[:, :, None])
        number = valid.sum(dim=2, keepdim=True)
        mean = (iou * valid).sum(dim=2, keepdim=True) / number.clamp(min=1)
        variance = ((iou - mean).pow(2) * valid).sum(dim=2, keepdim=True)
        threshold = mean + (variance / (number - 1).clamp(min=1)).sqrt()
        nearest_side = sides(centres(ours), boxes[:, :, None]).amin(dim=-1)
        positive = valid & (iou >= threshold) & (nearest_side > self.margin)
        return index, iou, positive
