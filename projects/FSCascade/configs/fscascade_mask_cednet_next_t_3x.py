"""Cascade Mask R-CNN with the shared features of FSCascade, on CEDNet-NeXt-T (in neither paper)."""

from .common.mask_branch import mask_branch
from .fscascade_cednet_next_t_3x import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.update(mask_branch)
dataloader.train.mapper.update(use_instance_mask=True, recompute_boxes=True)
