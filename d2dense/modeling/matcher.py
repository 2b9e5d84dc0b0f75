"""Which ground-truth box each anchor belongs to, without waiting for the device.

Letters: G ground-truth boxes, R anchors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2dense.errors import UserError

__all__ = ["LOW_QUALITY_MATCHES", "AnchorMatcher"]

LOW_QUALITY_MATCHES = ("none", "best", "own")


class AnchorMatcher:
    """Labels anchors by their largest IoU with the ground truth; a drop-in for Detectron2's
    ``Matcher``, which makes the host wait several times per image.

    Args:
        thresholds: increasing IoUs that separate the labels
        labels: one more than thresholds, from the lowest IoU on: 0 negative, -1 ignored, 1 positive
        low_quality_matches: whether the anchors that overlap a box most become positive however low
            their IoU is (ties too; never without any overlap), and whose they are: ``none`` no;
            ``best`` as in Detectron2, the box that the anchor overlaps most; ``own`` as in
            MMDetection, the box that it was chosen for, of several the last one
    """

    def __init__(
        self,
        *,
        thresholds: Sequence[float] = (0.4, 0.5),
        labels: Sequence[int] = (0, -1, 1),
        low_quality_matches: str = "best",
    ):
        if low_quality_matches not in LOW_QUALITY_MATCHES:
            raise UserError(
                f"low_quality_matches (MODEL.RETINANET.LOW_QUALITY_MATCHES) is "
                f"{low_quality_matches!r}; expected one of {', '.join(LOW_QUALITY_MATCHES)}"
            )
        if len(labels) != len(thresholds) + 1 or list(thresholds) != sorted(thresholds):
            raise UserError(
                f"IoU thresholds {list(thresholds)} with labels {list(labels)}: expected "
                "increasing ones (MODEL.RETINANET.IOU_THRESHOLDS) and one label more (IOU_LABELS)"
            )
        if not set(labels) <= {-1, 0, 1}:
            raise UserError(f"IoU labels {list(labels)}: expected -1, 0 and 1 (IOU_LABELS)")
        self.thresholds = tuple(thresholds)
        self.labels = tuple(labels)
        self.low_quality_matches = low_quality_matches

    def __call__(self, iou: Tensor) -> tuple[Tensor, Tensor]:
        """Match anchors with boxes.

        Args:
            iou: ``(G, R)``

        Returns:
            the matched box of each anchor, ``(R,)`` int64 in ``[0, G)``, and its label, ``(R,)``
            int8. Without boxes all matches are 0 and all labels the lowest IoU's.
        """
        num_boxes, num_anchors = iou.shape
        if num_boxes == 0 or num_anchors == 0:
            matches = torch.zeros(num_anchors, dtype=torch.int64, device=iou.device)
            return matches, torch.full_like(matches, self.labels[0], dtype=torch.int8)
        best, matches = iou.max(dim=0)
        labels = torch.full_like(matches, self.labels[0], dtype=torch.int8)
        for threshold, label in zip(self.thresholds, self.labels[1:]):
            labels = labels.masked_fill(best >= threshold, label)
        if self.low_quality_matches == "none":
            return matches, labels
        chosen = (iou == iou.amax(dim=1, keepdim=True)) & (iou > 0)
        is_chosen = chosen.any(dim=0)
        if self.low_quality_matches == "own":
            numbers = torch.arange(num_boxes, device=iou.device)[:, None]
            last = numbers.masked_fill(~chosen, -1).amax(dim=0)
            matches = torch.where(is_chosen, last, matches)
        return matches, labels.masked_fill(is_chosen, 1)
