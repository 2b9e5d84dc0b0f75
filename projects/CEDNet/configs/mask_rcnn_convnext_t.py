"""Mask R-CNN on ConvNeXt-T with FPN.

``model.backbone.bottom_up.pretrained=true`` starts from timm's ImageNet weights.
"""

from d2dense.config import detectors

from .common.coco_masks import dataloader, lr_multiplier, optimizer, train

model = detectors.mask_rcnn(backbone=detectors.timm_fpn("convnext_tiny", size_divisibility=128))
model.backbone.bottom_up.drop_path_rate = 0.4
