"""HFGD with Swin-L and SemanticFPN's upsampling (Table 3: 59.32 mIoU)."""

from .hfgd_swin_l_os4_pascal_context import dataloader, lr_multiplier, model, optimizer, train

model.sem_seg_head.upsampler = "sfpn"
