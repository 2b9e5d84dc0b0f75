"""Cascade R-CNN on ResNet-101, 40 epochs (Table 2)."""

from .cascade_rcnn_r101_fpn_1x import dataloader, model, optimizer, train
from .common.coco import schedule

train.max_iter, lr_multiplier = schedule(40)
