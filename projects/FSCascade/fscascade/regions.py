"""Regions of a whole batch in flat tensors: labels, clipping, and pooling from pyramid levels.

Letters: N images, R regions over all images, G ground-truth boxes over all images, L pyramid
    levels, F foreground regions,
K classes. Boxes are absolute xyxy. Working on flat tensors leaves one host synchronisation per
stage, whatever N is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

__all__ = [
    "GroundTruth",
    "Regions",
    "batch_ground_truth",
    "clip_regions",
    "image_limits",
    "label_regions",
    "pool_lists",
    "pool_regions",
    "select_regions",
]


class GroundTruth(NamedTuple):
    """Ground truth of a batch: boxes ``(G, 4)``, classes ``(G,)`` and the image that each belongs
    to ``(G,)``.
    """

    boxes: Tensor
    classes: Tensor
    image: Tensor


class Regions(NamedTuple):
    """Labelled regions of a batch.

    Attributes:
        boxes: ``(R, 4)``, without gradient
        image: ``(R,)`` index of the image
        classes: ``(R,)`` in ``[0, K]``; K is background
        gt_boxes: ``(R, 4)``, meaningful where foreground
        foreground: ``(F,)`` rows with a foreground class
        level_rows: for each pyramid level the rows that are pooled from it
        num_images: N
    """

    boxes: Tensor
    image: Tensor
    classes: Tensor
    gt_boxes: Tensor
    foreground: Tensor
    level_rows: tuple[Tensor, ...]
    num_images: int


def batch_ground_truth(targets: list[Instances]) -> GroundTruth:
    """Concatenate the targets of N images."""
    return GroundTruth(
        torch.cat([t.gt_boxes.tensor for t in targets]),
        torch.cat([t.gt_classes for t in targets]),
        torch.cat([torch.full_like(t.gt_classes, n) for n, t in enumerate(targets)]),
    )


def image_limits(image_sizes: list[tuple[int, int]], like: Tensor) -> Tensor:
    """Return ``(N, 4)`` rows (width, height, width, height), filled on the device of ``like``."""
    limits = like.new_empty((len(image_sizes), 4))
    for n, (height, width) in enumerate(image_sizes):
        limits[n, 0::2] = width
        limits[n, 1::2] = height
    return limits


def clip_regions(boxes: Tensor, image: Tensor, limits: Tensor) -> Tensor:
    """Clip boxes ``(R, 4)`` to their images."""
    return torch.minimum(boxes.clamp(min=0), limits[image])


def label_regions(
    boxes: Tensor, image: Tensor, gt: GroundTruth, *, iou_threshold: float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Match boxes with the ground truth of their image.

    Returns:
        classes ``(R,)``, background (K) below the threshold, and the matched ground-truth boxes
        ``(R, 4)``.
    """
    if gt.boxes.shape[0] == 0:
        return torch.full_like(image, num_classes), torch.zeros_like(boxes)
    iou = pairwise_iou(Boxes(gt.boxes), Boxes(boxes))  # (G, R)
    iou = iou.masked_fill(gt.image[:, None] != image, -1.0)
    best, matched = iou.max(dim=0)
    background = ~(best >= iou_threshold)
    return gt.classes[matched].masked_fill(background, num_classes), gt.boxes[matched]


def select_regions(
    *,
    boxes: Tensor,
    image: Tensor,
    classes: Tensor,
    gt_boxes: Tensor,
    keep: Tensor,
    pooler: ROIPooler,
    num_classes: int,
    num_images: int,
) -> tuple[Regions, Tensor]:
    """Drop regions and find out everything whose size depends on data, with one host
    synchronisation.

    Args:
        boxes, image, classes, gt_boxes: as in :class:`Regions`
        keep: ``(R,)`` True for regions that stay

    Returns:
        the regions, and the rows ``(R',)`` that were kept
    """
    num_levels = len(pooler.level_poolers)
    levels = _levels(pooler, boxes).masked_fill(~keep, num_levels)
    foreground = keep & (classes >= 0) & (classes < num_classes)
    counts = [keep.sum(), foreground.sum(), *((levels == k).sum() for k in range(num_levels))]
    num_kept, num_foreground, *per_level = torch.stack(counts).tolist()
    kept = _true_rows(keep, num_kept)
    regions = Regions(
        boxes=boxes[kept],
        image=image[kept],
        classes=classes[kept],
        gt_boxes=gt_boxes[kept],
        foreground=_true_rows(foreground[kept], num_foreground),
        level_rows=levels[kept].argsort(stable=True).split(per_level),
        num_images=num_images,
    )
    return regions, kept


def pool_regions(pooler: ROIPooler, features: list[Tensor], regions: Regions) -> Tensor:
    """Return the pooled features ``(R, C, S, S)``, equal to ``pooler(features, boxes)``."""
    return _pool(pooler, features, regions.boxes, regions.image, regions.level_rows)


def pool_lists(pooler: ROIPooler, features: list[Tensor], boxes: list[Tensor]) -> Tensor:
    """Pool boxes given as one tensor ``(R_n, 4)`` per image; one host synchronisation."""
    image = torch.cat([b.new_full(b.shape[:1], n, dtype=torch.int64) for n, b in enumerate(boxes)])
    flat = torch.cat(boxes)
    levels = _levels(pooler, flat)
    num_levels = len(pooler.level_poolers)
    counts = torch.stack([(levels == k).sum() for k in range(num_levels)]).tolist()
    return _pool(pooler, features, flat, image, levels.argsort(stable=True).split(counts))


def _pool(
    pooler: ROIPooler,
    features: list[Tensor],
    boxes: Tensor,
    image: Tensor,
    level_rows: tuple[Tensor, ...],
) -> Tensor:
    rois = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1)
    if len(level_rows) == 1:
        return pooler.level_poolers[0](features[0], rois)
    shape = (boxes.shape[0], features[0].shape[1], *pooler.output_size)
    pooled = features[0].new_empty(shape)  # every row belongs to exactly one level
    for level_pooler, feature, rows in zip(pooler.level_poolers, features, level_rows):
        pooled.index_put_((rows,), level_pooler(feature, rois[rows]))
    return pooled


def _levels(pooler: ROIPooler, boxes: Tensor) -> Tensor:
    """Return the pyramid level ``(R,)`` of each box; a box that is not finite gets one too."""
    num_levels = len(pooler.level_poolers)
    if num_levels == 1:
        return boxes.new_zeros(boxes.shape[:1], dtype=torch.int64)
    levels = assign_boxes_to_levels(
        [Boxes(boxes)],
        pooler.min_level,
        pooler.max_level,
        pooler.canonical_box_size,
        pooler.canonical_level,
    )
    return levels.clamp(0, num_levels - 1)


def _true_rows(mask: Tensor, count: int) -> Tensor:
    """Return the rows ``(count,)`` where mask is True, in order; ``nonzero`` would ask the device
    for the count.
    """
    return (~mask).to(torch.uint8).argsort(stable=True)[:count]
