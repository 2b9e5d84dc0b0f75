"""DINO of 5 scales in 36 epochs (Table 4)."""

from .common.recipes import schedule
from .dino_5scale_r50_1x import dataloader, model, optimizer

train, lr_multiplier = schedule(36, 30)
