"""DINO of 5 scales on ResNet-50, 12 epochs (Tables 3 and 4, K = 0)."""

from codetr import nodes

from .common.recipes import adamw, coco, schedule

model = nodes.dino()
dataloader = coco()
optimizer = adamw()
train, lr_multiplier = schedule(12, 11)
