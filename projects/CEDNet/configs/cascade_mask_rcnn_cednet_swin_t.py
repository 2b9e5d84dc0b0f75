"""Cascade Mask R-CNN on CEDNet-Swin-T."""

from .cascade_mask_rcnn_cednet_next_t import dataloader, lr_multiplier, model, optimizer, train
from .common.trunks import swin_t as _trunk

model.backbone.trunk = _trunk
model.backbone.trunk.drop_path = 0.1
optimizer.lr = 1e-4
