"""Deformable DETR on ResNet-50, in one stage and without box refinement, 12 epochs of 32 images
(Table 2, K = 0).
"""

from codetr import nodes

from .common.recipes import adamw, coco, schedule

model = nodes.deformable_detr()
dataloader = coco(batch_size=32)
optimizer = adamw(slower=("backbone", "sampling_offsets", "reference_points"))
train, lr_multiplier = schedule(12, 11, batch_size=32)
