"""Co-DINO on ResNet-50, 12 epochs (Table 4)."""

from codetr import nodes

from .common.recipes import adamw, coco, schedule

model = nodes.co_dino()
dataloader = coco()
optimizer = adamw()
train, lr_multiplier = schedule(12, 11)
