"""ATSS as an auxiliary head.

Letters: N images, C channels, A anchors of all levels together, K classes, Hl and Wl size of level
l.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor

from d2dense.modeling.box_regression import giou_loss

from ..auxiliary import AuxiliaryHead, Candidates
from .anchors import CellAnchors, inside_images
from .assignment import Assignment, ATSSAssigner
from .boxes import BoxCoder
from .dense import (
    LevelScales,
    Tower,
    average_factor,
    dense_arguments,
    dense_detections,
    flatten_levels,
    focal_sum,
    output_conv,
)
from .objects import Objects, pad_objects

__all__ = ["ATSSHead", "anchor_candidates", "centerness"]


class ATSSOutputs(NamedTuple):
    """Raw outputs per level: logits ``(N, K, Hl, Wl)``, deltas ``(N, 4, Hl, Wl)``, centerness
    logits ``(N, 1, Hl, Wl)``.
    """

    logits: list[Tensor]
    deltas: list[Tensor]
    centerness: list[Tensor]


class ATSSHead(AuxiliaryHead):
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
    """

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
    ):
        super().__init__()
        self.strides = tuple(strides)
        self.num_classes = num_classes
        self.anchors = CellAnchors(strides=strides, scales=(anchor_scale,))
        self.assigner = ATSSAssigner(candidates=candidates)
        self.coder = BoxCoder(stds=stds)
        self.class_tower = Tower(channels=channels, layers=convs)
        self.box_tower = Tower(channels=channels, layers=convs)
        self.classes = output_conv(channels, num_classes, prior=0.01)
        self.boxes = output_conv(channels, 4)
        self.centerness = output_conv(channels, 1)
        self.scales = LevelScales(levels=len(self.strides))
        self.class_weight, self.giou_weight = class_weight, giou_weight
        self.centerness_weight = centerness_weight
        self.detection = {
            "score_threshold": score_threshold,
            "candidates_per_level": candidates_per_level,
            "nms_threshold": nms_threshold,
            "max_detections": max_detections,
        }

    @classmethod
    def from_config(
        cls, cfg: CfgNode, *, channels: int, strides: Sequence[int], num_classes: int
    ) -> dict:
        return dense_arguments(
            cfg.MODEL.CODETR.ATSS, channels=channels, strides=strides, num_classes=num_classes
        )

    def predict(self, maps: Sequence[Tensor]) -> ATSSOutputs:
        """Return the raw outputs of all levels."""
        towers = [self.box_tower(each) for each in maps]
        return ATSSOutputs(
            logits=[self.classes(self.class_tower(each)) for each in maps],
            deltas=self.scales([self.boxes(each) for each in towers]),
            centerness=[self.centerness(each) for each in towers],
        )

    def losses(
        self, maps: Sequence[Tensor], instances: Sequence[Instances]
    ) -> tuple[dict[str, Tensor], Candidates]:
        """See :class:`AuxiliaryHead`; ``loss_cls``, ``loss_bbox`` and ``loss_centerness``."""
        objects = pad_objects(instances, maps[0].device)
        inside = inside_images(maps, self.strides, objects.sizes)
        anchors = self.anchors.of(maps)
        assignment = self.assigner(anchors, inside, objects)
        anchors = torch.cat(anchors)
        outputs = self.predict(maps)
        losses = self._losses(outputs, anchors, assignment, objects)
        return losses, anchor_candidates(maps, anchors, inside, assignment, objects, self)

    def _losses(
        self, outputs: ATSSOutputs, anchors: Tensor, assignment: Assignment, objects: Objects
    ) -> dict[str, Tensor]:
        positive = assignment.positive
        number = average_factor(positive.sum(dim=1).clamp(min=1).sum())
        labels = assignment.labels(objects, self.num_classes)
        targets = assignment.targets(objects, anchors)
        rating = centerness(anchors, targets) * positive
        decoded = self.coder.decode(anchors, flatten_levels(outputs.deltas, 4))
        overlap = giou_loss(decoded, targets) * rating
        centre_logits = flatten_levels(outputs.centerness, 1)[..., 0]
        centred = F.binary_cross_entropy_with_logits(centre_logits, rating, reduction="none")
        return {
            "loss_cls": self.class_weight
            * focal_sum(flatten_levels(outputs.logits, self.num_classes), labels)
            / number,
            "loss_bbox": self.giou_weight * overlap.sum() / average_factor(rating.sum()),
            "loss_centerness": self.centerness_weight * (centred * positive).sum() / number,
        }

    def detect(
        self, maps: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """See :class:`AuxiliaryHead`; scores are multiplied by the centerness."""
        outputs = self.predict(maps)
        anchors = self.anchors.of(maps)
        return dense_detections(
            flatten_levels(outputs.logits, self.num_classes).sigmoid(),
            self.coder.decode(torch.cat(anchors), flatten_levels(outputs.deltas, 4)),
            [len(each) for each in anchors],
            image_sizes,
            ratings=flatten_levels(outputs.centerness, 1)[..., 0].sigmoid(),
            **self.detection,
        )


def centerness(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Return how central the anchors' centres are in ``boxes`` around them, in [0, 1], ``(...)``.

    Args:
        anchors, boxes: ``(..., 4)``, xyxy
    """
    centres = (anchors[..., :2] + anchors[..., 2:]) / 2
    before, behind = centres - boxes[..., :2], boxes[..., 2:] - centres
    ratio = torch.minimum(before, behind) / torch.maximum(before, behind).clamp(min=1e-6)
    return ratio.clamp(min=0).prod(dim=-1).sqrt()


def anchor_candidates(
    maps: Sequence[Tensor],
    anchors: Tensor,
    inside: Tensor,
    assignment: Assignment,
    objects: Objects,
    head: AuxiliaryHead,
) -> Candidates:
    """Return all anchors as candidates, with the feature of their cell.

    As in the official code, anchors outside their image are background too, with a box of zeros.

    Args:
        maps: ``(N, C, Hl, Wl)`` per level
        anchors: ``(A, 4)``
        inside: ``(N, A)``
        head: has ``anchors`` and ``num_classes``
    """
    background = ~assignment.positive
    classes = objects.classes.gather(1, assignment.matched)
    features = torch.cat([each.flatten(2).transpose(1, 2) for each in maps], dim=1)
    rows = None
    if head.anchors.per_cell > 1:
        rows = torch.arange(len(anchors), device=anchors.device) // head.anchors.per_cell
    return Candidates(
        boxes=anchors * inside[..., None],
        labels=classes.masked_fill(background, head.num_classes),
        targets=assignment.targets(objects, torch.zeros_like(anchors)),
        usable=torch.ones_like(inside),
        features=features,
        rows=rows,
    )
