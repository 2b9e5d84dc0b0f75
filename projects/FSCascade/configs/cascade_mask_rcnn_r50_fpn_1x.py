"""Cascade Mask R-CNN."""

from .cascade_rcnn_r50_fpn_1x import dataloader, lr_multiplier, model, optimizer, train
from .common.mask_branch import mask_branch

model.roi_heads.update(mask_branch)
dataloader.train.mapper.use_instance_mask = True
