"""SemanticFPN on Cityscapes (Table 8: 76.44 mIoU)."""

from .hfgd_r50_os4_cityscapes import dataloader, lr_multiplier, model, optimizer, train

model.sem_seg_head.encoder = "identity"
model.sem_seg_head.upsampler = "sfpn"
model.sem_seg_head.hfgm = False
