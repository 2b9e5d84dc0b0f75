"""HFGD with SemanticFPN's upsampling and no axial attention (Table 2: 49.22 mIoU)."""

from .hfgd_r50_sfpn_pascal_context import dataloader, lr_multiplier, model, optimizer, train

model.sem_seg_head.axial_attention = False
