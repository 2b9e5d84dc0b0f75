"""ATSS gives Deformable DETR queries, but is not trained; 36 epochs (Table 9)."""

from .deformable_detr_r50_atss_3x import dataloader, lr_multiplier, model, optimizer, train

model.train_heads = False
