"""DAB-DETR on the last map of ResNet-50, 36 epochs (Table 2, K = 0)."""

from codetr import nodes

from .common.recipes import adamw, coco, schedule

model = nodes.dab_detr()
dataloader = coco()
optimizer = adamw(lr=1e-4)
train, lr_multiplier = schedule(36, 30)
