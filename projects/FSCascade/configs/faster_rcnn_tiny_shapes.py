"""The tiny model with one stage: Faster R-CNN, the baseline of the figures."""

from .cascade_rcnn_tiny_shapes import dataloader, lr_multiplier, model, optimizer, train

for _per_stage in ("box_heads", "box_predictors", "iou_thresholds", "stage_loss_weights"):
    model.roi_heads[_per_stage] = model.roi_heads[_per_stage][:1]
model.roi_heads.box_predictors[0].cls_agnostic_bbox_reg = False
