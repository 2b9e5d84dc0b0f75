"""SemanticFPN with ConvNeXtV2-L (Table 10: 63.5 mIoU)."""

from .hfgd_convnextv2_l_os4_pascal_context import dataloader, lr_multiplier, model, optimizer, train

model.sem_seg_head.encoder = "identity"
model.sem_seg_head.upsampler = "sfpn"
model.sem_seg_head.hfgm = False
