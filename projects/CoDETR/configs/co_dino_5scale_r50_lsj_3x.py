"""Co-DINO++ in 36 epochs (Table 4)."""

from .co_dino_5scale_r50_lsj_1x import dataloader, model, optimizer
from .common.recipes import schedule

train, lr_multiplier = schedule(36, 30)
