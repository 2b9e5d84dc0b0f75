"""The recipe of Tables 4 and 6: 12 epochs instead of 36."""

from .coco import dataloader, iterations, optimizer, schedule, train

lr_multiplier = schedule(epochs=12, steps=(8, 11))
train.max_iter = iterations(12)
