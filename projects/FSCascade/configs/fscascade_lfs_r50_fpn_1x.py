"""Localisation feature sharing only (Table 1, last rows)."""

from .fscascade_r50_fpn_1x import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.cfs = False
