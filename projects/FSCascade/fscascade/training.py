"""Box losses of a cascade in training.

Letters: R regions over all images, G ground-truth boxes. Every stage labels, pools and refines the
regions of the whole batch at once; the class features of all stages are computed together at the
end, since boxes do not depend on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from . import regions as batch
from .regions import GroundTruth, Regions
from .statistics import log_statistics

if TYPE_CHECKING:
    from .roi_heads import FSCascadeROIHeads

__all__ = ["box_losses"]


def box_losses(
    heads: FSCascadeROIHeads,
    features: dict[str, Tensor],
    proposals: list[Instances],
    targets: list[Instances],
) -> dict[str, Tensor]:
    """Return ``loss_cls_stage<k>`` and ``loss_box_reg_stage<k>`` of all stages, weighted.

    Args:
        features: pyramid levels by name
        proposals: the sampled and labelled regions of stage 1
        targets: ground truth per image
    """
    levels = [features[name] for name in heads.box_in_features]
    ground_truth = batch.batch_ground_truth(targets)
    pooled, own, deltas, stages = [], [], [], []
    for k, predictor in enumerate(heads.box_predictor):
        if k == 0:
            regions, kept = _sampled_regions(heads, proposals)
        else:
            boxes = heads.box_predictor[k - 1].decode(deltas[-1].detach(), regions.boxes)
            regions, kept = _next_regions(heads, boxes, regions, ground_truth, proposals, k)
        x = batch.pool_regions(heads.box_pooler, levels, regions)
        if heads.scale_gradients and x.requires_grad:
            x.register_hook(lambda grad: grad * (1.0 / heads.num_cascade_stages))
        if heads.loc_head is None:
            box_feature = heads.box_head.own(x, k)
            own.append(box_feature)
        else:
            # Cached features belong to the previous stage's regions: drop the rows that it dropped.
            previous = box_feature[kept] if heads.loc_head.cached and k > 0 else x
            box_feature = heads.loc_head(x, k, previous)
        pooled.append(x)
        deltas.append(predictor.deltas(box_feature))
        stages.append(regions)
    return _stage_losses(heads, heads.box_head(pooled, own), deltas, stages)


def _stage_losses(
    heads: FSCascadeROIHeads,
    class_features: list[Tensor],
    deltas: list[Tensor],
    stages: list[Regions],
) -> dict[str, Tensor]:
    losses, logits = {}, []
    for k, predictor in enumerate(heads.box_predictor):
        logits.append(predictor.logits(class_features[k]))
        for name, loss in predictor.region_losses(logits[k], deltas[k], stages[k]).items():
            losses[f"{name}_stage{k}"] = loss * heads.stage_loss_weights[k]
    log_statistics(logits, stages)
    return losses


@torch.no_grad()
def _sampled_regions(
    heads: FSCascadeROIHeads, proposals: list[Instances]
) -> tuple[Regions, Tensor]:
    classes = [p.gt_classes for p in proposals]
    boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
    # An image without ground truth has no gt_boxes; its regions are background and never read them.
    gt_boxes = [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
    return batch.select_regions(
        boxes=boxes,
        image=torch.cat([torch.full_like(c, n) for n, c in enumerate(classes)]),
        classes=torch.cat(classes),
        gt_boxes=torch.cat(gt_boxes),
        keep=torch.ones_like(boxes[:, 0], dtype=torch.bool),
        pooler=heads.box_pooler,
        num_classes=heads.num_classes,
        num_images=len(proposals),
    )


@torch.no_grad()
def _next_regions(
    heads: FSCascadeROIHeads,
    boxes: Tensor,
    previous: Regions,
    ground_truth: GroundTruth,
    proposals: list[Instances],
    stage: int,
) -> tuple[Regions, Tensor]:
    """Clip and re-label the boxes ``(R, 4)`` of the previous stage, and drop the empty ones."""
    limits = batch.image_limits([p.image_size for p in proposals], boxes)
    boxes = batch.clip_regions(boxes, previous.image, limits)
    classes, gt_boxes = batch.label_regions(
        boxes,
        previous.image,
        ground_truth,
        iou_threshold=heads.iou_thresholds[stage],
        num_classes=heads.num_classes,
    )
    return batch.select_regions(
        boxes=boxes,
        image=previous.image,
        classes=classes,
        gt_boxes=gt_boxes,
        keep=Boxes(boxes).nonempty(),
        pooler=heads.box_pooler,
        num_classes=heads.num_classes,
        num_images=previous.num_images,
    )
