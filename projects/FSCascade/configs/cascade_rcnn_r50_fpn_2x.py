"""Cascade R-CNN, 40 epochs (Table 2); the ensemble rows use test_scores=ensemble_last_rois."""

from .cascade_rcnn_r50_fpn_1x import dataloader, model, optimizer, train
from .common.coco import schedule

train.max_iter, lr_multiplier = schedule(40)
