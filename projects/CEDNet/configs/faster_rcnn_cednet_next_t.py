"""Faster R-CNN on CEDNet-NeXt-T: Mask R-CNN and its recipe without masks (not in the paper)."""

from d2dense.config import detectors

from .common.coco import dataloader, lr_multiplier, optimizer, train
from .mask_rcnn_cednet_next_t import model as _mask_rcnn

model = detectors.faster_rcnn(backbone=_mask_rcnn.backbone)
