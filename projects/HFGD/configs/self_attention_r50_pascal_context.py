"""Self-attention with a classifier at output stride 32 (Table 1: 45.02 mIoU)."""

from .identity_r50_pascal_context import dataloader, lr_multiplier, model, optimizer, train

model.sem_seg_head.encoder = "self_attention"
