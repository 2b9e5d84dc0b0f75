"""Detections from the predictions of the last layer.

Letters: N images, Q queries, K classes, M candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import box_convert

from .soft_nms import soft_nms

__all__ = ["Selection"]


class Selection:
    """The pairs of query and class with the highest scores, above zero.

    Args:
        max_detections: per image
        soft_nms_iou: with :func:`soft_nms` at this IoU between boxes of a class, of as many pairs
            as there are queries; None: without
        min_score, by_offset: see :func:`soft_nms`
    """

    def __init__(
        self,
        *,
        max_detections: int = 100,
        soft_nms_iou: float | None = None,
        min_score: float = 1e-3,
        by_offset: bool = False,
    ):
        self.max_detections = max_detections
        self.soft_nms_iou, self.min_score, self.by_offset = soft_nms_iou, min_score, by_offset

    def __call__(
        self,
        logits: Tensor,
        boxes: Tensor,
        sizes: Tensor,
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """Return the detections of each image, best first, cut at the borders.

        Args:
            logits: ``(N, Q, K)``
            boxes: ``(N, Q, 4)``, cxcywh relative to ``sizes``
            sizes: ``(N, 1, 4)``, width, height, width, height in pixels
            image_sizes: of the results, height and width without padding
        """
        queries, num_classes = logits.shape[1:]
        scores = logits.float().sigmoid().flatten(1)
        count = self.max_detections if self.soft_nms_iou is None else queries
        scores, index = scores.topk(min(count, scores.shape[1]), dim=1)
        query = (index // num_classes)[..., None].expand(-1, -1, 4)
        boxes = box_convert(boxes, "cxcywh", "xyxy").gather(1, query) * sizes
        boxes = torch.minimum(boxes.clamp(min=0), sizes)
        classes = index % num_classes
        if scores.is_meta:  # costs are counted without values, on which the rest depends
            return _instances(boxes, scores, classes, image_sizes)
        if self.soft_nms_iou is not None:
            scores = soft_nms(
                boxes,
                scores,
                classes,
                iou=self.soft_nms_iou,
                min_score=self.min_score,
                by_offset=self.by_offset,
            )
            scores, order = scores.topk(min(self.max_detections, scores.shape[1]), dim=1)
            boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
            classes = classes.gather(1, order)
        found = _instances(boxes, scores, classes, image_sizes)
        return [each[each.scores > 0] for each in found]


def _instances(
    boxes: Tensor, scores: Tensor, classes: Tensor, image_sizes: Sequence[tuple[int, int]]
) -> list[Instances]:
    return [
        Instances(size, pred_boxes=Boxes(boxes[i]), scores=scores[i], pred_classes=classes[i])
        for i, size in enumerate(image_sizes)
    ]
