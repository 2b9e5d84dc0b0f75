"""Co-DINO++ with nine encoder layers, 12 epochs."""

from .co_dino_5scale_r50_lsj_1x import dataloader, lr_multiplier, model, optimizer, train

model.encoder.layers = 9
