"""Ultra SemanticFPN alone (Table 4: 46.99 mIoU)."""

from .semantic_fpn_r50_pascal_context import dataloader, lr_multiplier, model, optimizer, train

model.sem_seg_head.upsampler = "usfpn"
