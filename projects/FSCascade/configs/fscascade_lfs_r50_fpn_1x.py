"""Localisation feature sharing only (Table 1, last rows)."""

from .fscascade_r50_fpn_1x import model

model.roi_heads.cfs = False
