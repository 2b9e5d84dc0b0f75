"""The recipe of the Swin baselines with masks."""

from .coco_masks import dataloader, lr_multiplier, train
from .coco_swin import optimizer
