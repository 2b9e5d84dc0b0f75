"""ATSS as an auxiliary head.

Letters: N images, C channels, A anchors of all levels together, K classes, Hl and Wl size of level
l.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor

from d2dense.modeling.box_regression import giou_loss

from .anchor_head import AnchorHead
from .anchors import CellAnchors
from .assignment import Assignment, ATSSAssigner
from .boxes import BoxCoder, centres
from .dense import (
    LevelScales,
    Tower,
    average_factor,
    average_positives,
    flatten_levels,
    focal_sum,
    output_conv,
)
from .objects import Objects

__all__ = ["ATSSHead", "centerness"]


class ATSSOutputs(NamedTuple):
    """Raw outputs per level: logits ``(N, K, Hl, Wl)``, deltas ``(N, 4, Hl, Wl)``, centerness
    logits ``(N, 1, Hl, Wl)``.
    """

    logits: list[Tensor]
    deltas: list[Tensor]
    centerness: list[Tensor]


class ATSSHead(AnchorHead):
    """One square anchor per cell, adaptive training sample selection, focal loss, generalised IoU
    weighted by centerness, and centerness.

    Args:
        channels: C
        strides: of the maps, in pixels
        num_classes: K
        convs: of each tower; 4 in ATSS, 1 in Co-DETR
        anchor_scale: side of the anchors, in strides
        stds: of the box coder
        candidates: closest anchors per object and level
        class_weight, giou_weight, centerness_weight: of the losses
        score_threshold, candidates_per_level, nms_threshold, max_detections: of :meth:`detect`, see
            :func:`dense_detections`
        soft_nms, by_offset: how it suppresses
    """

    node = "ATSS"

    @configurable
    def __init__(
        self,
        *,
        channels: int = 256,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        num_classes: int = 80,
        convs: int = 1,
        anchor_scale: float = 8.0,
        stds: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
        candidates: int = 9,
        class_weight: float = 1.0,
        giou_weight: float = 2.0,
        centerness_weight: float = 1.0,
        score_threshold: float = 0.0,
        candidates_per_level: int = 1000,
        nms_threshold: float = 0.6,
        max_detections: int = 100,
        soft_nms: bool = False,
        by_offset: bool = False,
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
            soft_nms=soft_nms,
            by_offset=by_offset,
        )
        self.assigner = ATSSAssigner(candidates=candidates)
        self.coder = BoxCoder(stds=stds)
        self.class_tower = Tower(channels=channels, layers=convs)
        self.box_tower = Tower(channels=channels, layers=convs)
        self.classes = output_conv(channels, num_classes, prior=0.01)
        self.boxes = output_conv(channels, 4)
        self.centerness = output_conv(channels, 1)
        self.scales = LevelScales(levels=len(self.strides))
        self.centerness_weight = centerness_weight

    def predict(self, maps: Sequence[Tensor]) -> ATSSOutputs:
        """Return the raw outputs of all levels."""
        towers = [self.box_tower(each) for each in maps]
        return ATSSOutputs(
            logits=[self.classes(self.class_tower(each)) for each in maps],
            deltas=self.scales([self.boxes(each) for each in towers]),
            centerness=[self.centerness(each) for each in towers],
        )

    def assigned_losses(
        self, maps: Sequence[Tensor], levels: Sequence[Tensor], inside: Tensor, objects: Objects
    ) -> tuple[dict[str, Tensor], Assignment]:
        """See :class:`AnchorHead`; ``loss_cls``, ``loss_bbox`` and ``loss_centerness``."""
        assignment = self.assigner(levels, inside, objects)
        outputs, anchors = self.predict(maps), torch.cat(list(levels))
        positive = assignment.positive
        number = average_positives(positive)
        labels, counted = assignment.labels(objects, self.num_classes), self.counted(objects)
        targets = assignment.targets(objects, anchors)
        rating = centerness(anchors, targets) * positive
        decoded = self.coder.decode(anchors, flatten_levels(outputs.deltas, 4))
        overlap = giou_loss(decoded, targets) * rating
        centre_logits = flatten_levels(outputs.centerness, 1)[..., 0]
        centred = F.binary_cross_entropy_with_logits(centre_logits, rating, reduction="none")
        losses = {
            "loss_cls": self.class_weight
            * focal_sum(flatten_levels(outputs.logits, self.num_classes), labels, counted)
            / number,
            "loss_bbox": self.giou_weight * overlap.sum() / average_factor(rating.sum()),
            "loss_centerness": self.centerness_weight * (centred * positive).sum() / number,
        }
        return losses, assignment

    def scored_boxes(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`DenseHead`; ratings are the centerness."""
        outputs = self.predict(maps)
        anchors = torch.cat(self.anchors.of(maps))
        return (
            flatten_levels(outputs.logits, self.num_classes).sigmoid(),
            self.coder.decode(anchors, flatten_levels(outputs.deltas, 4)),
            flatten_levels(outputs.centerness, 1)[..., 0].sigmoid(),
        )


def centerness(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Return how central the anchors' centres are in ``boxes`` around them, in [0, 1], ``(...)``.

    Args:
        anchors, boxes: ``(..., 4)``, xyxy
    """
    middle = centres(anchors)
    before, behind = middle - boxes[..., :2], boxes[..., 2:] - middle
    ratio = torch.minimum(before, behind) / torch.maximum(before, behind).clamp(min=1e-6)
    return ratio.clamp(min=0).prod(dim=-1).sqrt()
