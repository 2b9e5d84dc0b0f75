"""Cascade Mask R-CNN on ConvNeXt-B with FPN.

``model.backbone.bottom_up.pretrained=true`` starts from timm's ImageNet weights.
"""

from d2dense.config import detectors

from .common.coco_cascade import dataloader, lr_multiplier, optimizer, train

model = detectors.cascade_mask_rcnn(
    backbone=detectors.timm_fpn("convnext_base", size_divisibility=128)
)
model.backbone.bottom_up.drop_path_rate = 0.7
optimizer.params.layer_decay = 0.8
