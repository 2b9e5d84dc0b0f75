"""ResNet-50 with a classifier at output stride 32 (Table 1: 45.87 mIoU)."""

from .semantic_fpn_r50_pascal_context import dataloader, lr_multiplier, model, optimizer, train

model.sem_seg_head.upsampler = "none"
