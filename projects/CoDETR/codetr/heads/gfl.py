"""GFL as an auxiliary head: scores that say how good the box is, distances as distributions.

Letters: N images, C channels, A anchors of all levels together, K classes, B bins of a distance, Hl
and Wl size of level l.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from torch import Tensor

from d2dense.modeling.box_regression import giou_loss
from d2dense.modeling.detr.criterion import quality_focal_loss

from .anchor_head import AnchorHead
from .anchors import CellAnchors
from .assignment import Assignment, ATSSAssigner
from .boxes import boxes_around, centres, sides
from .dense import (
    LevelScales,
    Tower,
    average_factor,
    average_positives,
    flatten_levels,
    output_conv,
    sum_over_classes,
)
from .objects import Objects, paired_iou

__all__ = ["GFLHead", "distribution_loss"]


class GFLHead(AnchorHead):
    """Generalised focal loss: the anchors of ATSS; quality focal loss whose targets are IoUs,
    generalised IoU and distribution focal loss, both weighted by the largest score.

    Args:
        channels: C
        strides: of the maps, in pixels
        num_classes: K
        convs: of each tower; 4 in GFL, 1 in Co-DETR
        anchor_scale: side of the anchors, in strides; only their centres are predicted from
        reach: B - 1, the largest distance from an anchor's centre to a side of its box, in strides
        candidates: closest anchors per object and level
        class_weight, giou_weight, distribution_weight: of the losses
        score_threshold, candidates_per_level, nms_threshold, max_detections: of :meth:`detect`, see
            :func:`dense_detections`
    """

    node = "GFL"

    @configurable
    def __init__(
        self,
        *,
        channels: int = 256,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        num_classes: int = 80,
        convs: int = 1,
        anchor_scale: float = 8.0,
        reach: int = 16,
        candidates: int = 9,
        class_weight: float = 1.0,
        giou_weight: float = 2.0,
        distribution_weight: float = 0.25,
        score_threshold: float = 0.05,
        candidates_per_level: int = 1000,
        nms_threshold: float = 0.6,
        max_detections: int = 100,
    ):
        super().__init__(
            strides=strides,
            num_classes=num_classes,
            anchors=CellAnchors(strides=strides, scales=(anchor_scale,)),
            class_weight=class_weight,
            giou_weight=giou_weight,
            score_threshold=score_threshold,
            candidates_per_level=candidates_per_level,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
        )
        self.reach = reach
        self.assigner = ATSSAssigner(candidates=candidates)
        self.class_tower = Tower(channels=channels, layers=convs)
        self.box_tower = Tower(channels=channels, layers=convs)
        self.classes = output_conv(channels, num_classes, prior=0.01)
        self.distances = output_conv(channels, 4 * (reach + 1))
        self.scales = LevelScales(levels=len(self.strides))
        self.distribution_weight = distribution_weight

    def predict(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits of the classes ``(N, A, K)``, and of the distances from the anchors'
        centres to left, top, right and bottom in strides ``(N, A, 4, B)``, both float32.
        """
        logits = [self.classes(self.class_tower(each)) for each in maps]
        distances = self.scales([self.distances(self.box_tower(each)) for each in maps])
        flat = flatten_levels(distances, 4 * (self.reach + 1))
        return flatten_levels(logits, self.num_classes), flat.unflatten(2, (4, -1))

    def assigned_losses(
        self, maps: Sequence[Tensor], levels: Sequence[Tensor], inside: Tensor, objects: Objects
    ) -> tuple[dict[str, Tensor], Assignment]:
        """See :class:`AnchorHead`; ``loss_cls``, ``loss_bbox`` and ``loss_dfl``."""
        assignment = self.assigner(levels, inside, objects)
        anchors, positive = torch.cat(list(levels)), assignment.positive
        labels = assignment.labels(objects, self.num_classes)
        targets = assignment.targets(objects, anchors)

        logits, distances = self.predict(maps)
        units = self.anchors.strides_of(levels)[:, None]
        boxes = _boxes(anchors, distances, units)
        with torch.no_grad():
            weight = logits.sigmoid().amax(dim=-1) * positive
            quality = paired_iou(boxes, targets)[..., None] * _one_hot(labels, self.num_classes)
            wanted = sides(centres(anchors), targets) / units
        number = average_positives(positive)
        total = average_factor(weight.sum())
        focal = quality_focal_loss(logits, quality)
        focal = sum_over_classes(focal, self.counted(objects)) * inside
        overlap = giou_loss(boxes, targets) * weight
        spread = distribution_loss(distances, wanted).mean(dim=-1) * weight
        losses = {
            "loss_cls": self.class_weight * focal.sum() / number,
            "loss_bbox": self.giou_weight * overlap.sum() / total,
            "loss_dfl": self.distribution_weight * spread.sum() / total,
        }
        return losses, assignment

    def scored_boxes(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, None]:
        """See :class:`DenseHead`."""
        logits, distances = self.predict(maps)
        levels = self.anchors.of(maps)
        units = self.anchors.strides_of(levels)[:, None]
        boxes = _boxes(torch.cat(levels), distances, units)
        return logits.sigmoid(), boxes, None


def distribution_loss(logits: Tensor, values: Tensor) -> Tensor:
    """Return the cross entropies with distributions over the two whole numbers beside each value
    that have it as their mean, ``(...)``.

    Args:
        logits: ``(..., B)``, of the whole numbers from 0 on
        values: ``(...)``; moved into [0, B - 1.1], so that both neighbours exist
    """
    values = values.clamp(0, logits.shape[-1] - 1.1)
    lower = values.floor()
    share = values - lower
    logs = -logits.log_softmax(dim=-1)
    neighbours = torch.stack([lower, lower + 1], dim=-1).long()
    below, above = logs.gather(-1, neighbours).unbind(dim=-1)
    return below * (1 - share) + above * share


def _boxes(anchors: Tensor, distances: Tensor, units: Tensor) -> Tensor:
    """Return the boxes ``(N, A, 4)``, xyxy in pixels, at the mean distances from the anchors'
    centres, which are given in ``units`` ``(A, 1)``.
    """
    numbers = torch.arange(distances.shape[-1], device=distances.device, dtype=distances.dtype)
    means = (distances.softmax(dim=-1) * numbers).sum(dim=-1)
    return boxes_around(centres(anchors), means * units)


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    return labels[..., None] == torch.arange(num_classes, device=labels.device)
