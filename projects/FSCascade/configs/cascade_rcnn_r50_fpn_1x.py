"""Cascade R-CNN: nothing shared; the fc feature also predicts the boxes."""

from .fscascade_cfs_r50_fpn_1x import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.cfs = False
