"""Cascade Mask R-CNN on CEDNet-NeXt-T with the official recipe.

Set ``train.init_checkpoint`` to an ImageNet checkpoint that tools/convert_checkpoint.py has
converted.
"""

from d2dense.config import detectors

from .common.coco_cascade import dataloader, lr_multiplier, optimizer, train
from .mask_rcnn_cednet_next_t import model as _mask_rcnn

model = detectors.cascade_mask_rcnn(backbone=_mask_rcnn.backbone)
