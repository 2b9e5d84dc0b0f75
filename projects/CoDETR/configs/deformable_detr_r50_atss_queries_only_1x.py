"""ATSS gives Deformable DETR queries, but is not trained; 12 epochs (Table 9)."""

from .deformable_detr_r50_atss_1x import dataloader, lr_multiplier, model, optimizer, train

model.train_heads = False
