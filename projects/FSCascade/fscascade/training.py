"""Box losses of a cascade in training.

Letters: R regions over all images. Every stage labels, pools and refines the
regions of the whole batch at once; the class features of all stages are computed together at the
end, since boxes do not depend on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from detectron2.structures import Instances
from torch import Tensor

from d2dense.modeling import regions as batch
from d2dense.modeling.region_statistics import log_statistics
from d2dense.modeling.regions import Regions

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
            regions, kept = batch.sampled_regions(
                proposals, pooler=heads.box_pooler, num_classes=heads.num_classes
            )
        else:
            boxes = heads.box_predictor[k - 1].decode(deltas[-1].detach(), regions.boxes)
            regions, kept = batch.refined_regions(
                boxes,
                regions,
                ground_truth,
                image_sizes=[p.image_size for p in proposals],
                iou_threshold=heads.iou_thresholds[k],
                pooler=heads.box_pooler,
                num_classes=heads.num_classes,
            )
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
