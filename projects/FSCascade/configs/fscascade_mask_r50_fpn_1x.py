"""FSCascade with Detectron2's mask branch."""

from .common.mask_branch import mask_branch
from .fscascade_r50_fpn_1x import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.update(mask_branch)
dataloader.train.mapper.use_instance_mask = True
