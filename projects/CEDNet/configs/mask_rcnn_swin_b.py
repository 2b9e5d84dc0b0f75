"""Mask R-CNN on Swin-B with FPN.

``model.backbone.bottom_up.pretrained=true`` starts from timm's ImageNet weights.
"""

from d2dense.config import detectors

from .common.coco_swin_masks import dataloader, lr_multiplier, optimizer, train

model = detectors.mask_rcnn(
    backbone=detectors.timm_fpn("swin_base_patch4_window7_224", size_divisibility=128)
)
model.backbone.bottom_up.drop_path_rate = 0.3
