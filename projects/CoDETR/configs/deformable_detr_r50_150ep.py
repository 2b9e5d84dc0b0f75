"""Deformable DETR in 150 epochs (Table 10); the rate drops after 120, in proportion to 50."""

from .common.recipes import schedule
from .deformable_detr_r50_1x import dataloader, model, optimizer

train, lr_multiplier = schedule(150, 120, batch_size=32)
