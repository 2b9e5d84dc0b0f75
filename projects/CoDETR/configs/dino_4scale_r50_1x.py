"""DINO of 4 scales on ResNet-50, 12 epochs."""

from codetr import nodes

from .common.recipes import adamw, coco, schedule

model = nodes.dino(levels=4)
dataloader = coco()
optimizer = adamw()
train, lr_multiplier = schedule(12, 11)
