"""RetinaNet on ConvNeXt-S with FPN.

``model.backbone.bottom_up.pretrained=true`` starts from timm's ImageNet weights.
"""

from d2dense.config import detectors

from .common.coco import dataloader, lr_multiplier, optimizer, train

model = detectors.retinanet(
    backbone=detectors.timm_fpn("convnext_small", top="p6p7", size_divisibility=128)
)
model.backbone.bottom_up.drop_path_rate = 0.6
