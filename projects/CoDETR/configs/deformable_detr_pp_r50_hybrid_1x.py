"""Deformable-DETR++ with hybrid matching: H-Deformable-DETR in batches of 32 (Table 7, K = 0)."""

from d2dense.config import detr

from .deformable_detr_pp_r50_1x import dataloader, lr_multiplier, model, optimizer, train

detr.hybrid_matching(model)
