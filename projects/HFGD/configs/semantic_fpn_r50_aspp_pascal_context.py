"""ASPP under SemanticFPN (Table 1: 47.81 mIoU)."""

from .semantic_fpn_r50_pascal_context import dataloader, lr_multiplier, model, optimizer, train

model.sem_seg_head.encoder = "aspp"
