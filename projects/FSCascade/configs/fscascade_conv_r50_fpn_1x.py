"""Convolutional localisation head of each stage's own, nothing shared (Table 1, middle rows)."""

from .fscascade_r50_fpn_1x import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.cfs = False
model.roi_heads.loc_head.sharing = False
