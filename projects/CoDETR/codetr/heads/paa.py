"""PAA as an auxiliary head: each object's anchors are separated by how well they are predicted.

Letters: N images, C channels, A anchors of all levels together, Al anchors of level l, G most
objects in an image, V candidates of an object, K classes, D detections, Hl and Wl size of level l.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.structures import Boxes, Instances
from torch import Tensor

from d2dense.modeling.box_regression import giou_loss

from .assignment import Assignment, IoUAssigner
from .atss import ATSSHead
from .dense import average_factor, average_positives, flatten_levels, focal_losses
from .mixture import fit_mixture
from .objects import Objects, chunks, paired_iou

__all__ = ["PAAHead", "separate", "vote"]


class PAAHead(ATSSHead):
    """Probabilistic anchor assignment: the anchors and layers of ATSS, whose third output is the
    IoU of the box instead of the centerness.

    Of the anchors that overlap an object enough (and its best ones), those with the lowest losses
    are split by a mixture of two Gaussians. An object with a single candidate gets that one.

    Args:
        channels: C
        strides: of the maps, in pixels
        num_classes: K
        convs: of each tower; 4 in PAA, 1 in Co-DETR
        anchor_scale, stds: as in :class:`ATSSHead`
        least_iou: of candidates, with the object that they overlap most
        candidates: with the lowest losses per object and level
        class_weight, giou_weight, iou_weight: of the losses; the first two also in the losses that
            separate candidates
        voting: spread of the weights of :func:`vote`; None: boxes are not averaged
        score_threshold, candidates_per_level, nms_threshold, max_detections: of :meth:`detect`, see
            :func:`dense_detections`
    """

    node = "PAA"

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
        least_iou: float = 0.1,
        candidates: int = 9,
        class_weight: float = 1.0,
        giou_weight: float = 1.3,
        iou_weight: float = 0.5,
        voting: float | None = 0.025,
        score_threshold: float = 0.05,
        candidates_per_level: int = 1000,
        nms_threshold: float = 0.6,
        max_detections: int = 100,
    ):
        super().__init__(
            channels=channels,
            strides=strides,
            num_classes=num_classes,
            convs=convs,
            anchor_scale=anchor_scale,
            stds=stds,
            class_weight=class_weight,
            giou_weight=giou_weight,
            centerness_weight=iou_weight,
            score_threshold=score_threshold,
            candidates_per_level=candidates_per_level,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
        )
        self.assigner: Any = IoUAssigner(positive=least_iou, negative=least_iou, claim=0.0)
        self.candidates = candidates
        self.voting = voting

    def assigned_losses(
        self, maps: Sequence[Tensor], levels: Sequence[Tensor], inside: Tensor, objects: Objects
    ) -> tuple[dict[str, Tensor], Assignment]:
        """See :class:`AnchorHead`; ``loss_cls``, ``loss_bbox`` and ``loss_iou``."""
        anchors = torch.cat(list(levels))
        outputs = self.predict(maps)
        logits = flatten_levels(outputs.logits, self.num_classes)
        boxes = self.coder.decode(anchors, flatten_levels(outputs.deltas, 4))

        first = self.assigner(anchors, inside, objects)
        with torch.no_grad():
            labels = first.labels(objects, self.num_classes)
            costs = self.class_weight * focal_losses(logits, labels)
            costs += self.giou_weight * giou_loss(boxes, first.targets(objects, anchors))
        sizes = [len(each) for each in levels]
        assignment = separate(first, costs, sizes, objects, most=self.candidates)

        positive = assignment.positive
        targets = assignment.targets(objects, anchors)
        number = average_positives(positive)
        labels = assignment.labels(objects, self.num_classes)
        focal = focal_losses(logits, labels, self.counted(objects))
        iou = paired_iou(boxes.detach(), targets) * positive
        overlap = giou_loss(boxes, targets) * iou
        ratings = flatten_levels(outputs.centerness, 1)[..., 0]
        rated = F.binary_cross_entropy_with_logits(ratings, iou, reduction="none") * positive
        losses = {
            "loss_cls": self.class_weight * focal.sum() / number,
            "loss_bbox": self.giou_weight * overlap.sum() / average_factor(iou.sum()),
            "loss_iou": self.centerness_weight * rated.sum() / number,
        }
        return losses, assignment

    def scored_boxes(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, None]:
        """See :class:`DenseHead`; scores are the geometric means of class and IoU."""
        scores, boxes, ratings = super().scored_boxes(maps)
        return (scores * ratings[..., None]).sqrt(), boxes, None

    @torch.no_grad()
    def detect(
        self, maps: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """See :class:`AuxiliaryHead`; boxes are averaged if there is voting."""
        scored = self.scored_boxes(maps)
        detections = self.best(maps, image_sizes, *scored)
        if self.voting is None:
            return detections
        everything = scored[0][0].numel()
        others = self.best(maps, image_sizes, *scored, nms_threshold=1.0, max_detections=everything)
        return [vote(*pair, spread=self.voting) for pair in zip(detections, others)]


@torch.no_grad()
def separate(
    first: Assignment, costs: Tensor, levels: Sequence[int], objects: Objects, *, most: int = 9
) -> Assignment:
    """Return the assignment without the positives that belong to an object's worse component;
    anchors that lose their object are negative.

    Of each object's positives, the ``most`` cheapest per level are sorted by cost. Those of the
    component with the lower mean at the start stay, up to the one where the density of the mixture
    is highest among them.

    Args:
        costs: ``(N, A)``
        levels: Al, A in total
    """
    costs = costs.masked_fill(~first.positive, torch.inf)
    numbers = torch.arange(objects.there.shape[1], device=costs.device)[:, None]
    chosen = [
        _cheapest(first.matched, costs, levels, numbers[part], most)
        for part in chunks(objects, costs.shape[1])
    ]
    values, index = (torch.cat(each, dim=1) for each in zip(*chosen))  # (N, G, V)
    values, order = values.sort(dim=-1)
    index, mask = index.gather(-1, order), values.isfinite()
    values = values.masked_fill(~mask, 0.0)
    logs = fit_mixture(values, mask).log_densities(values)
    low = mask & (logs[..., 0] >= logs[..., 1])
    density = logs.logsumexp(dim=-1).masked_fill(~low, -torch.inf)
    rank = torch.arange(values.shape[-1], device=values.device)
    stays = low & (rank <= density.argmax(dim=-1, keepdim=True))
    nowhere = costs.shape[1]
    kept = torch.zeros(len(costs), nowhere + 1, dtype=torch.bool, device=costs.device)
    kept = kept.scatter(1, index.where(stays, nowhere).flatten(1), True)[:, :nowhere]
    return Assignment(
        matched=first.matched.where(kept, 0),
        positive=kept,
        negative=first.negative | (first.positive & ~kept),
    )


def _cheapest(
    matched: Tensor, costs: Tensor, levels: Sequence[int], numbers: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """Return costs, infinite where there are fewer, and indices of the anchors, ``(N, g, V)``, that
    are the cheapest of the objects ``numbers`` ``(g, 1)`` in each level.
    """
    values, index, first = [], [], 0
    for size in levels:
        level = slice(first, first + size)
        mine = matched[:, None, level] == numbers  # (N, g, Al)
        value, place = (
            costs[:, None, level]
            .where(mine, torch.inf)
            .topk(min(most, size), dim=-1, largest=False)
        )
        values.append(value)
        index.append(place + first)
        first += size
    return torch.cat(values, dim=-1), torch.cat(index, dim=-1)


def vote(detections: Instances, others: Instances, *, spread: float) -> Instances:
    """Return the detections with boxes averaged over all others of the class that overlap them, by
    score times exp(-(1 - IoU)^2 / spread).
    """
    boxes, voters = detections.pred_boxes.tensor, others.pred_boxes.tensor
    iou = paired_iou(boxes[:, None], voters)  # (D, all)
    heard = (iou > 0.01) & (detections.pred_classes[:, None] == others.pred_classes)
    weights = (torch.exp(-((1 - iou) ** 2) / spread) * others.scores * heard)[..., None]
    total = weights.sum(dim=1)
    detections.pred_boxes = Boxes(
        torch.where(total > 0, (weights * voters).sum(dim=1) / total, boxes)
    )
    return detections
