"""Co-Deformable-DETR on ResNet-50, 12 epochs (Table 4)."""

from codetr import nodes

from .common.recipes import adamw, coco, schedule

model = nodes.co_deformable_detr()
dataloader = coco()
optimizer = adamw(slower=("backbone", "sampling_offsets"))
train, lr_multiplier = schedule(12, 11)
