"""Regions of a whole batch in flat tensors: labels, clipping, and pooling from pyramid levels.

Letters: N images, R regions over all images, G ground-truth boxes over all images, L pyramid
    levels, F foreground regions, K classes.
Boxes are absolute xyxy. Working on flat tensors leaves one host synchronisation per set of regions,
whatever N is.
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
    "clip_lists",
    "clip_regions",
    "foreground_instances",
    "image_limits",
    "label_regions",
    "pool_lists",
    "pool_regions",
    "refined_regions",
    "sampled_regions",
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
        matched: ``(R,)`` row of ``gt_boxes`` in the :class:`GroundTruth`, meaningful where
            foreground; None for regions that Detectron2 has sampled
    """

    boxes: Tensor
    image: Tensor
    classes: Tensor
    gt_boxes: Tensor
    foreground: Tensor
    level_rows: tuple[Tensor, ...]
    num_images: int
    matched: Tensor | None = None


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


def clip_lists(boxes: list[Tensor], proposals: list[Instances]) -> list[Tensor]:
    """Clip the boxes ``(R_n, 4)`` of each image; Detectron2's ``Boxes.clip`` also checks them on
    the host, per image.
    """
    clipped: list[Tensor] = []
    for b, p in zip(boxes, proposals):
        height, width = p.image_size
        x1 = b[:, 0].clamp(min=0, max=width)
        y1 = b[:, 1].clamp(min=0, max=height)
        x2 = b[:, 2].clamp(min=0, max=width)
        y2 = b[:, 3].clamp(min=0, max=height)
        clipped.append(torch.stack((x1, y1, x2, y2), dim=1))
    return clipped


def label_regions(
    boxes: Tensor, image: Tensor, gt: GroundTruth, *, iou_threshold: float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Match boxes with the ground truth of their image.

    Args:
        boxes: ``(R, 4)``
        image: ``(R,)``, the image of each
        iou_threshold: of foreground, at least
        num_classes: K

    Returns:
        classes ``(R,)``, background (K) below the threshold, and the row of the matched ground
        truth ``(R,)``, 0 if there is none.
    """
    if gt.boxes.shape[0] == 0:
        return torch.full_like(image, num_classes), torch.zeros_like(image)
    iou = pairwise_iou(Boxes(gt.boxes), Boxes(boxes))  # (G, R)
    iou = iou.masked_fill(gt.image[:, None] != image, -1.0)
    best, matched = iou.max(dim=0)
    background = ~(best >= iou_threshold)
    return gt.classes[matched].masked_fill(background, num_classes), matched


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
    matched: Tensor | None = None,
) -> tuple[Regions, Tensor]:
    """Drop regions and find out everything whose size depends on data, with one host
    synchronisation.

    Args:
        boxes, image, classes, gt_boxes, matched: as in :class:`Regions`
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
        matched=None if matched is None else matched[kept],
    )
    return regions, kept


@torch.no_grad()
def sampled_regions(
    proposals: list[Instances], *, pooler: ROIPooler, num_classes: int
) -> tuple[Regions, Tensor]:
    """Return the regions that Detectron2's ``label_and_sample_proposals`` gives, and their rows
    ``(R,)``, as :func:`select_regions` does.

    Args:
        proposals: per image, with ``proposal_boxes``, ``gt_classes`` and, where it has objects,
            ``gt_boxes``
        pooler: whose levels the regions are shared out to
        num_classes: K
    """
    classes = [p.gt_classes for p in proposals]
    boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
    # An image without ground truth has no gt_boxes; its regions are background and never read them.
    gt_boxes = [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
    return select_regions(
        boxes=boxes,
        image=torch.cat([torch.full_like(c, n) for n, c in enumerate(classes)]),
        classes=torch.cat(classes),
        gt_boxes=torch.cat(gt_boxes),
        keep=torch.ones_like(boxes[:, 0], dtype=torch.bool),
        pooler=pooler,
        num_classes=num_classes,
        num_images=len(proposals),
    )


@torch.no_grad()
def refined_regions(
    boxes: Tensor,
    previous: Regions,
    ground_truth: GroundTruth,
    *,
    image_sizes: list[tuple[int, int]],
    iou_threshold: float,
    pooler: ROIPooler,
    num_classes: int,
) -> tuple[Regions, Tensor]:
    """Return the regions of the next stage: clipped, labelled anew, without empty ones.

    Args:
        boxes: what the previous stage made of its regions, ``(R, 4)``
        previous: those regions
        image_sizes: (height, width) of the N images
        iou_threshold: foreground IoU of the next stage

    Returns:
        the regions, and the rows of ``boxes`` that they are
    """
    boxes = clip_regions(boxes, previous.image, image_limits(image_sizes, boxes))
    classes, matched = label_regions(
        boxes,
        previous.image,
        ground_truth,
        iou_threshold=iou_threshold,
        num_classes=num_classes,
    )
    has_truth = ground_truth.boxes.shape[0] > 0
    return select_regions(
        boxes=boxes,
        image=previous.image,
        classes=classes,
        gt_boxes=ground_truth.boxes[matched] if has_truth else torch.zeros_like(boxes),
        keep=Boxes(boxes).nonempty(),
        pooler=pooler,
        num_classes=num_classes,
        num_images=previous.num_images,
        matched=matched,
    )


def foreground_instances(regions: Regions, targets: list[Instances]) -> list[Instances]:
    """Return the foreground regions per image with ``proposal_boxes`` and ``gt_classes``, and the
    ``gt_masks`` of the targets that they matched.

    For mask heads, which go image by image; one host synchronisation.
    """
    rows = regions.foreground
    counts = torch.bincount(regions.image[rows], minlength=regions.num_images).tolist()
    boxes = regions.boxes[rows].split(counts)
    classes = regions.classes[rows].split(counts)
    assert regions.matched is not None, "only regions that were labelled know their objects"
    matched = regions.matched[rows].split(counts)
    result, start = [], 0
    for n, target in enumerate(targets):
        instances = Instances(target.image_size)
        instances.proposal_boxes = Boxes(boxes[n])
        instances.gt_classes = classes[n]
        if target.has("gt_masks"):
            instances.gt_masks = target.gt_masks[matched[n] - start]
        result.append(instances)
        start += len(target)
    return result


def pool_regions(pooler: ROIPooler, features: list[Tensor], regions: Regions) -> Tensor:
    """Return the pooled features ``(R, C, S, S)``, equal to ``pooler(features, boxes)``."""
    return _pool(pooler, features, regions.boxes, regions.image, regions.level_rows)


def pool_lists(pooler: ROIPooler, features: list[Tensor], boxes: list[Tensor]) -> Tensor:
    """Return the pooled features ``(R, C, S, S)`` of boxes given as one tensor ``(R_n, 4)`` per
    image; one host synchronisation.

    Args:
        features: the pooler's levels, ``(N, C, Hi, Wi)``
    """
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
