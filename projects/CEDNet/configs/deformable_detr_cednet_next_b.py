"""Deformable DETR on CEDNet-NeXt-B."""

from .common.coco_detr import plain_adamw as _plain_adamw
from .common.trunks import next_b as _trunk
from .deformable_detr_cednet_next_t import dataloader, lr_multiplier, model, train

model.backbone.trunk = _trunk
model.backbone.trunk.drop_path = 0.3
optimizer = _plain_adamw()
