"""Co-DINO++ with nine encoder layers, 36 epochs."""

from .co_dino_5scale_r50_lsj_3x import dataloader, lr_multiplier, model, optimizer, train

model.encoder.layers = 9
