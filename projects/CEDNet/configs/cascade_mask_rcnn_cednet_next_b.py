"""Cascade Mask R-CNN on CEDNet-NeXt-B."""

from .cascade_mask_rcnn_cednet_next_t import dataloader, lr_multiplier, model, optimizer, train
from .common.trunks import next_b as _trunk

model.backbone.trunk = _trunk
model.backbone.trunk.drop_path = 0.4
optimizer.params.layer_decay = 0.7
