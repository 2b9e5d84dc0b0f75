"""HFGD with leading convolutions of 3x3 (text: 50.42 mIoU instead of 50.76)."""

from .hfgd_r50_os4_pascal_context import dataloader, lr_multiplier, model, optimizer, train

model.sem_seg_head.lead_kernel = 3
