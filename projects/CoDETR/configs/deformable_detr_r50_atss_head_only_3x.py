"""ATSS is trained beside Deformable DETR, but gives it no queries; 36 epochs (Table 9)."""

from .deformable_detr_r50_atss_3x import dataloader, lr_multiplier, model, optimizer, train

model.positive_queries = None
