"""Swin-L under Ultra SemanticFPN alone (Table 4: 58.69 mIoU)."""

from .hfgd_swin_l_os4_pascal_context import dataloader, lr_multiplier, model, optimizer, train

model.sem_seg_head.encoder = "identity"
model.sem_seg_head.hfgm = False
