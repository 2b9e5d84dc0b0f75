"""HFGD with SemanticFPN's upsampling (Tables 2 and 3: 50.28 mIoU)."""

from .hfgd_r50_os4_pascal_context import dataloader, lr_multiplier, model, optimizer, train

model.sem_seg_head.upsampler = "sfpn"
