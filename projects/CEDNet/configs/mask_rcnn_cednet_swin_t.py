"""Mask R-CNN on CEDNet-Swin-T."""

from .common.trunks import swin_t as _trunk
from .mask_rcnn_cednet_next_t import dataloader, lr_multiplier, model, optimizer, train

model.backbone.trunk = _trunk
model.backbone.trunk.drop_path = 0.1
