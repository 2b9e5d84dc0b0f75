"""FCOS as an auxiliary head: points near the centres of objects predict them.

Letters: N images, C channels, A points of all levels together (levels, rows, columns), G most
objects in an image, K classes, Hl and Wl size of level l.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.fcos import FCOSHead as FCOSLayers
from detectron2.structures import Instances
from torch import Tensor

from d2dense.errors import UserError
from d2dense.modeling.box_regression import giou_loss

from ..auxiliary import Candidates
from .anchors import CellAnchors
from .assignment import Assignment
from .atss import centerness
from .boxes import boxes_around, centres, sides
from .dense import DenseHead, average_factor, flatten_levels, focal_sum
from .objects import Objects, chunks, pad_objects

__all__ = ["FCOSHead", "assign_points"]


class FCOSHead(DenseHead):
    """FCOS with centre sampling; boxes in units of the stride; centerness from the box branch.

    A point of the level with stride s, in the middle of its cell, takes objects whose farthest side
    is in (4 s, 8 s] away, from 0 on at the finest level and without limit at the coarsest. That is
    64, 128, ... 512 for strides 8 to 128; a level of stride 4 takes sides up to 32. Points over the
    padding count as background, as in the original.

    The layers are Detectron2's, which have no learned scale per level, as boxes are normalised.

    Args:
        channels: C
        strides: of the levels, in pixels
        num_classes: K
        convs: 3x3 convolutions of each branch, at least 1
        radius: of the area around an object's centre that takes part, in strides
        class_weight, giou_weight, centerness_weight: of the losses
        score_threshold, candidates_per_level, nms_threshold, max_detections: of :meth:`detect`, see
            :func:`dense_detections`
    """

    node = "FCOS"

    @configurable
    def __init__(
        self,
        *,
        channels: int = 256,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        num_classes: int = 80,
        convs: int = 1,
        radius: float = 1.5,
        class_weight: float = 1.0,
        giou_weight: float = 1.0,
        centerness_weight: float = 1.0,
        score_threshold: float = 0.05,
        candidates_per_level: int = 1000,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ):
        if convs < 1:
            raise UserError(f"FCOS head with convs={convs}: expected at least 1")
        super().__init__(
            strides=strides,
            num_classes=num_classes,
            # a query of a point starts from a square of 8 strides around it
            anchors=CellAnchors(strides=strides, offset=0.5),
            class_weight=class_weight,
            giou_weight=giou_weight,
            score_threshold=score_threshold,
            candidates_per_level=candidates_per_level,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
        )
        self.radius = radius
        self.centerness_weight = centerness_weight
        self.layers = FCOSLayers(
            input_shape=[ShapeSpec(channels=channels, stride=stride) for stride in strides],
            conv_dims=[channels] * convs,
            num_classes=num_classes,
            norm="GN",
        )

    def predict(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits ``(N, A, K)``, distances in strides to the left, top, right and bottom
        ``(N, A, 4)``, and logits of the centerness ``(N, A)``, all float32.
        """
        logits, distances, ratings = self.layers(list(maps))
        return (
            flatten_levels(logits, self.num_classes),
            flatten_levels(distances, 4).relu(),
            flatten_levels(ratings, 1)[..., 0],
        )

    def losses(
        self, maps: Sequence[Tensor], instances: Sequence[Instances]
    ) -> tuple[dict[str, Tensor], Candidates]:
        """Return ``loss_cls``, ``loss_bbox`` and ``loss_centerness``, see
        :class:`AuxiliaryHead`.
        """
        logits, distances, ratings = self.predict(maps)
        squares, points, strides = self._grid(maps)
        objects = pad_objects(instances, logits.device)
        reaches = self._reaches(maps, points)
        assignment = assign_points(points, strides, reaches, objects, radius=self.radius)
        positive, labels = assignment.positive, assignment.labels(objects, self.num_classes)
        targets = assignment.targets(objects, squares)
        central = centerness(squares, targets) * positive
        overlap = giou_loss(boxes_around(points, distances * strides[:, None]), targets) * central
        rated = F.binary_cross_entropy_with_logits(ratings, central, reduction="none") * positive
        number = average_factor(positive.sum())
        focal = focal_sum(logits, labels, self.counted(objects))
        losses = {
            "loss_cls": self.class_weight * focal / number,
            "loss_bbox": self.giou_weight * overlap.sum() / average_factor(central.sum()),
            "loss_centerness": self.centerness_weight * rated.sum() / number,
        }
        candidates = Candidates(
            boxes=squares.expand_as(targets),
            labels=labels,
            targets=targets,
            usable=torch.ones_like(positive),
            features=torch.cat([each.flatten(2).transpose(1, 2) for each in maps], dim=1),
        )
        return losses, candidates

    def scored_boxes(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`DenseHead`; ratings are the centerness."""
        logits, distances, ratings = self.predict(maps)
        _, points, strides = self._grid(maps)
        boxes = boxes_around(points, distances * strides[:, None])
        return logits.sigmoid(), boxes, ratings.sigmoid()

    def _grid(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return squares ``(A, 4)``, xyxy, points ``(A, 2)`` and strides ``(A,)``, in pixels."""
        levels = self.anchors.of(maps)
        squares = torch.cat(levels)
        return squares, centres(squares), self.anchors.strides_of(levels)

    def _reaches(self, maps: Sequence[Tensor], like: Tensor) -> Tensor:
        """Return how far the farthest side of an object may be, above and up to, ``(A, 2)``."""
        lower = [-1.0, *(4.0 * stride for stride in self.strides[1:])]
        upper = [*(8.0 * stride for stride in self.strides[:-1]), math.inf]
        reaches = []
        for each, low, high in zip(maps, lower, upper):
            reach = like.new_empty(each.shape[2] * each.shape[3], 2)
            reach[:, 0], reach[:, 1] = low, high
            reaches.append(reach)
        return torch.cat(reaches)


@torch.no_grad()
def assign_points(
    points: Tensor, strides: Tensor, reaches: Tensor, objects: Objects, *, radius: float
) -> Assignment:
    """Return which objects the points belong to; none is ignored.

    A point takes the smallest of the objects in which it lies less than ``radius`` strides off the
    centre, both horizontally and vertically, and whose farthest side is within its reach.

    Args:
        points: ``(A, 2)``, x and y in pixels
        strides: ``(A,)``
        reaches: ``(A, 2)``, the distance to the farthest side is above the first and at most the
            second
    """
    shape = (len(objects.there), len(points))
    smallest = points.new_full(shape, math.inf)
    index = torch.zeros(shape, dtype=torch.int64, device=points.device)
    for part in chunks(objects, 4 * len(points)):
        boxes = objects.boxes[:, part, None]  # (N, G, 1, 4)
        distances = sides(points, boxes)
        off_centre = (points - centres(boxes)).abs().amax(dim=-1)
        farthest = distances.amax(dim=-1)
        fits = (distances.amin(dim=-1) > 0) & (off_centre < radius * strides)
        fits &= (farthest > reaches[:, 0]) & (farthest <= reaches[:, 1])
        fits &= objects.there[:, part, None]
        areas = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
        area, row = areas.expand_as(fits).masked_fill(~fits, math.inf).min(dim=1)
        index = torch.where(area < smallest, row + part.start, index)
        smallest = torch.minimum(area, smallest)
    positive = smallest < math.inf
    return Assignment(matched=index, positive=positive, negative=~positive)
