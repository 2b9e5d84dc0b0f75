"""Swin-L with the context-augmented encoder under Ultra SemanticFPN, without guidance (Table 4:
55.76 mIoU).
"""

from .hfgd_swin_l_os4_pascal_context import dataloader, lr_multiplier, model, optimizer, train

model.sem_seg_head.hfgm = False
