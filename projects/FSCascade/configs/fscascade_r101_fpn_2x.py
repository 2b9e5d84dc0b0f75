"""FSCascade on ResNet-101, 40 epochs (Table 2)."""

from .common.coco import schedule
from .fscascade_r101_fpn_1x import dataloader, model, optimizer, train

train.max_iter, lr_multiplier = schedule(40)
