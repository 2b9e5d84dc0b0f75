"""Suppression of detections that overlap better ones of their class.

Letters: M candidates of an image, R what is kept of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.layers import batched_nms
from torch import Tensor
from torchvision.ops import box_iou, nms

__all__ = ["Suppression"]


@dataclass(frozen=True, kw_only=True)
class Suppression:
    """What is kept of the candidates of an image.

    Args:
        iou: a box that overlaps a better one of its class by more than this is dropped
        soft: a box that overlaps by at least ``iou`` has its score multiplied by 1 - IoU instead,
            and is dropped below ``min_score``; waits for the device once for each box that is kept
        by_offset: keep classes apart as MMDetection does, by moving each to a place of its own,
            where single precision rounds coordinates
    """

    iou: float
    soft: bool = False
    by_offset: bool = False
    min_score: float = 1e-3

    def __call__(
        self, boxes: Tensor, scores: Tensor, classes: Tensor, *, most: int, first: int = 50
    ) -> tuple[Tensor, Tensor]:
        """Return the rows ``(R,)`` of what is kept, best first, and its scores ``(R,)``.

        Args:
            boxes: ``(M, 4)``, xyxy in pixels, not negative
            scores, classes: ``(M,)``
            most: of R
            first: candidates per row of the result to begin with; what is not among the best has no
                say in what the best ones suppress
        """
        places = boxes
        if self.by_offset and len(boxes):
            places = boxes + (classes * (boxes.amax() + 1))[:, None]
        if self.soft:
            return self._decayed(places, scores, classes, most)
        count = first * most
        while True:
            rows = scores.topk(min(count, len(scores))).indices
            if self.by_offset:
                kept = nms(places[rows], scores[rows], self.iou)
            else:
                kept = batched_nms(places[rows], scores[rows], classes[rows], self.iou)
            if len(kept) >= most or count >= len(scores):
                kept = rows[kept[:most]]
                return kept, scores[kept]
            count *= 8

    def _decayed(
        self, places: Tensor, scores: Tensor, classes: Tensor, most: int
    ) -> tuple[Tensor, Tensor]:
        """Take the best box that is left, lower those of its class that overlap it, and so on."""
        order = classes.argsort(stable=True)
        places, scores, classes = places[order], scores[order].clone(), classes[order]
        ends = classes.bincount().cumsum(0).tolist()
        kept, found = [], []
        while len(kept) < most and len(scores):
            best = int(scores.argmax())
            if scores[best] < self.min_score:
                break
            kept.append(best)
            found.append(scores[best].clone())
            label = int(classes[best])
            own = slice(ends[label - 1] if label else 0, ends[label])
            overlap = box_iou(places[best : best + 1], places[own])[0]
            scores[own] *= torch.where(overlap >= self.iou, 1 - overlap, 1.0)
            scores[best] = 0.0
        return order[kept], torch.stack(found) if found else scores[:0]
