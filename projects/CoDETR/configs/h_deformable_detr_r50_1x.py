"""H-Deformable-DETR on ResNet-50, 12 epochs of 16 images (quoted in Table 4)."""

from codetr import nodes

from .common.recipes import adamw, coco, schedule

model = nodes.h_deformable_detr()
dataloader = coco()
optimizer = adamw(slower=("backbone", "sampling_offsets"))
train, lr_multiplier = schedule(12, 11)
