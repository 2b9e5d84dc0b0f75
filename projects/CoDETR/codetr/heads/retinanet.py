"""RetinaNet as an auxiliary head.

Letters: N images, C channels, A anchors of all levels together, K classes, Hl and Wl size of level
l.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead as RetinaNetLayers
from detectron2.structures import Instances
from torch import Tensor

from d2dense.errors import UserError
from d2dense.modeling.box_regression import giou_loss

from ..auxiliary import AuxiliaryHead, Candidates
from .anchors import CellAnchors, inside_images, octaves
from .assignment import IoUAssigner
from .atss import anchor_candidates
from .boxes import BoxCoder
from .dense import average_factor, dense_arguments, dense_detections, flatten_levels, focal_sum
from .objects import pad_objects

__all__ = ["RetinaNetHead"]


class RetinaNetHead(AuxiliaryHead):
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
        super().__init__()
        if convs < 1:
            raise UserError(f"RetinaNet head with convs={convs}: expected at least 1")
        self.strides = tuple(strides)
        self.num_classes = num_classes
        self.anchors = CellAnchors(
            strides=strides, scales=octaves(anchor_scale, 3), ratios=(0.5, 1.0, 2.0)
        )
        self.assigner = IoUAssigner(positive=positive, negative=negative, claim=0.0)
        self.coder = BoxCoder()
        self.layers = RetinaNetLayers(
            input_shape=[ShapeSpec(channels=channels, stride=stride) for stride in strides],
            num_classes=num_classes,
            num_anchors=self.anchors.per_cell,
            conv_dims=[channels] * convs,
        )
        self.class_weight, self.giou_weight = class_weight, giou_weight
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
            cfg.MODEL.CODETR.RETINANET, channels=channels, strides=strides, num_classes=num_classes
        )

    def predict(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits ``(N, A, K)`` and deltas ``(N, A, 4)``, float32."""
        logits, deltas = self.layers(list(maps))
        return flatten_levels(logits, self.num_classes), flatten_levels(deltas, 4)

    def losses(
        self, maps: Sequence[Tensor], instances: Sequence[Instances]
    ) -> tuple[dict[str, Tensor], Candidates]:
        """See :class:`AuxiliaryHead`; ``loss_cls`` and ``loss_bbox``."""
        objects = pad_objects(instances, maps[0].device)
        inside = inside_images(maps, self.strides, objects.sizes, per_cell=self.anchors.per_cell)
        anchors = torch.cat(self.anchors.of(maps))
        assignment = self.assigner(anchors, inside, objects)
        logits, deltas = self.predict(maps)
        number = average_factor(assignment.positive.sum(dim=1).clamp(min=1).sum())
        focal = focal_sum(logits, assignment.labels(objects, self.num_classes))
        boxes = self.coder.decode(anchors, deltas)
        overlap = giou_loss(boxes, assignment.targets(objects, anchors)) * assignment.positive
        losses = {
            "loss_cls": self.class_weight * focal / number,
            "loss_bbox": self.giou_weight * overlap.sum() / number,
        }
        return losses, anchor_candidates(maps, anchors, inside, assignment, objects, self)

    @torch.no_grad()
    def detect(
        self, maps: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """See :class:`AuxiliaryHead`."""
        logits, deltas = self.predict(maps)
        levels = self.anchors.of(maps)
        return dense_detections(
            logits.sigmoid(),
            self.coder.decode(torch.cat(levels), deltas),
            [len(level) for level in levels],
            image_sizes,
            **self.detection,
        )
