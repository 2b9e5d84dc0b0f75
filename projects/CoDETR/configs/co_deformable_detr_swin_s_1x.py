"""Co-Deformable-DETR on Swin-S, 12 epochs.

Set ``train.init_checkpoint`` to the ImageNet-1k weights of the Swin.
"""

from codetr import nodes

from .common.recipes import adamw, coco, schedule

model = nodes.co_deformable_detr(nodes.swin("small", drop_path=0.2))
dataloader = coco()
optimizer = adamw(weight_decay=0.05, slower=("backbone", "sampling_offsets"))
train, lr_multiplier = schedule(12, 11, init="")
