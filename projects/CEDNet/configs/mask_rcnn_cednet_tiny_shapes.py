"""A small CEDNet Mask R-CNN that learns the generated shapes from scratch in minutes on a
CPU.
"""

from d2dense.config import detectors

from .common.tiny_shapes import backbone as _backbone
from .common.tiny_shapes import (
    dataloader,
    lr_multiplier,
    num_classes,
    optimizer,
    shrink_two_stage,
    train,
    width,
)

_backbone.out_features = ["p2", "p3", "p4", "p5", "p6"]
model = detectors.mask_rcnn(backbone=_backbone, num_classes=num_classes, channels=width)
shrink_two_stage(model)
dataloader.train.mapper.use_instance_mask = True
dataloader.train.mapper.recompute_boxes = True
