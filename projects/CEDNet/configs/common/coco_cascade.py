"""The recipe of Cascade Mask R-CNN: learning rates that are larger and decay faster."""

from .coco_masks import dataloader, lr_multiplier, optimizer, train

optimizer.lr = 2e-4
optimizer.params.layer_decay = 0.6
