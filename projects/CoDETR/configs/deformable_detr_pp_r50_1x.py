"""Deformable-DETR++ on ResNet-50, 12 epochs of 32 images (Tables 3, 7 and 11, K = 0)."""

from codetr import nodes

from .common.recipes import adamw, coco, schedule

model = nodes.deformable_detr_plus_plus()
dataloader = coco(batch_size=32)
optimizer = adamw(slower=("backbone", "sampling_offsets"))
train, lr_multiplier = schedule(12, 11, batch_size=32)
