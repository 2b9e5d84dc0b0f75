"""HFGD at output stride 4 on Cityscapes (Table 8: 79.11 mIoU)."""

from .hfgd_r50_os2_cityscapes import dataloader, lr_multiplier, model, optimizer, train

model.sem_seg_head.out_stride = 4
