"""Cascade Mask R-CNN on CEDNet-NeXt-S."""

from .cascade_mask_rcnn_cednet_next_t import dataloader, lr_multiplier, model, optimizer, train
from .common.trunks import next_s as _trunk

model.backbone.trunk = _trunk
model.backbone.trunk.drop_path = 0.3
optimizer.params.layer_decay = 0.7
