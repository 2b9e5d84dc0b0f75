"""HFGD at output stride 2 (Table 5: 51.00 mIoU)."""

from .hfgd_r50_os4_pascal_context import dataloader, lr_multiplier, model, optimizer, train

model.sem_seg_head.out_stride = 2
