"""RetinaNet as an auxiliary head.

Letters: N images, C channels, A anchors of all levels together, K classes, Hl and Wl size of level
l.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead as RetinaNetLayers
from torch import Tensor

from d2dense.errors import UserError
from d2dense.modeling.box_regression import giou_loss

from .anchor_head import AnchorHead
from .anchors import CellAnchors, octaves
from .assignment import Assignment, IoUAssigner
from .boxes import BoxCoder
from .dense import average_positives, flatten_levels, focal_sum
from .objects import Objects

__all__ = ["RetinaNetHead"]


class RetinaNetHead(AnchorHead):
    """Nine anchors per cell; positive are those with a large IoU and the best ones of every object;
    focal loss, and generalised IoU in place of the original's L1 on deltas (Table 1 of the paper).

    The layers are Detectron2's, without norms as in the original.

    Args:
        channels: C
        strides: of the maps, in pixels
        num_classes: K
        convs: of each branch, at least 1; 4 in RetinaNet, 1 in Co-DETR
        anchor_scale: side of the smallest of three square anchors in an octave, in strides
        positive, negative: IoUs; anchors with one in between are ignored
        class_weight, giou_weight: of the losses
        score_threshold, candidates_per_level, nms_threshold, max_detections: of :meth:`detect`, see
            :func:`dense_detections`
    """

    node = "RETINANET"

    @configurable
    def __init__(
        self,
        *,
        channels: int = 256,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        num_classes: int = 80,
        convs: int = 1,
        anchor_scale: float = 4.0,
        positive: float = 0.5,
        negative: float = 0.4,
        class_weight: float = 1.0,
        giou_weight: float = 1.0,
        score_threshold: float = 0.05,
        candidates_per_level: int = 1000,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ):
        if convs < 1:
            raise UserError(f"RetinaNet head with convs={convs}: expected at least 1")
        super().__init__(
            strides=strides,
            num_classes=num_classes,
            anchors=CellAnchors(
                strides=strides, scales=octaves(anchor_scale, 3), ratios=(0.5, 1.0, 2.0)
            ),
            class_weight=class_weight,
            giou_weight=giou_weight,
            score_threshold=score_threshold,
            candidates_per_level=candidates_per_level,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
        )
        self.assigner = IoUAssigner(positive=positive, negative=negative, claim=0.0)
        self.coder = BoxCoder()
        self.layers = RetinaNetLayers(
            input_shape=[ShapeSpec(channels=channels, stride=stride) for stride in strides],
            num_classes=num_classes,
            num_anchors=self.anchors.per_cell,
            conv_dims=[channels] * convs,
        )

    def predict(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits ``(N, A, K)`` and deltas ``(N, A, 4)``, float32."""
        logits, deltas = self.layers(list(maps))
        return flatten_levels(logits, self.num_classes), flatten_levels(deltas, 4)

    def assigned_losses(
        self, maps: Sequence[Tensor], levels: Sequence[Tensor], inside: Tensor, objects: Objects
    ) -> tuple[dict[str, Tensor], Assignment]:
        """See :class:`AnchorHead`; ``loss_cls`` and ``loss_bbox``."""
        anchors = torch.cat(list(levels))
        assignment = self.assigner(anchors, inside, objects)
        logits, deltas = self.predict(maps)
        number = average_positives(assignment.positive)
        labels = assignment.labels(objects, self.num_classes)
        focal = focal_sum(logits, labels, self.counted(objects))
        boxes = self.coder.decode(anchors, deltas)
        overlap = giou_loss(boxes, assignment.targets(objects, anchors)) * assignment.positive
        losses = {
            "loss_cls": self.class_weight * focal / number,
            "loss_bbox": self.giou_weight * overlap.sum() / number,
        }
        return losses, assignment

    def scored_boxes(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, None]:
        """See :class:`DenseHead`."""
        logits, deltas = self.predict(maps)
        anchors = torch.cat(self.anchors.of(maps))
        return logits.sigmoid(), self.coder.decode(anchors, deltas), None
