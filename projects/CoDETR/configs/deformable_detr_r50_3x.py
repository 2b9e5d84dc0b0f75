"""Deformable DETR in 36 epochs (Tables 2 and 8, K = 0)."""

from .common.recipes import schedule
from .deformable_detr_r50_1x import dataloader, model, optimizer

train, lr_multiplier = schedule(36, 30, batch_size=32)
