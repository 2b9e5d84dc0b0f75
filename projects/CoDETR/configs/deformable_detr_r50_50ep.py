"""Deformable DETR in 50 epochs (Table 10); the rate drops after 40."""

from .common.recipes import schedule
from .deformable_detr_r50_1x import dataloader, model, optimizer

train, lr_multiplier = schedule(50, 40, batch_size=32)
