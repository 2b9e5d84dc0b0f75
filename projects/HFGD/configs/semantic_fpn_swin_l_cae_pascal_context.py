"""Swin-L with the context-augmented encoder under SemanticFPN (Table 4: 56.78 mIoU)."""

from .hfgd_swin_l_os4_pascal_context import dataloader, lr_multiplier, model, optimizer, train

model.sem_seg_head.upsampler = "sfpn"
model.sem_seg_head.hfgm = False
