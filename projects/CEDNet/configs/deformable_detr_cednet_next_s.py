"""Deformable DETR on CEDNet-NeXt-S."""

from .common.trunks import next_s as _trunk
from .deformable_detr_cednet_next_t import dataloader, lr_multiplier, model, optimizer, train

model.backbone.trunk = _trunk
model.backbone.trunk.drop_path = 0.3
optimizer.params.layer_decay = 0.7
