"""Co-Deformable-DETR on Swin-L, 12 epochs.

Set ``train.init_checkpoint`` to the ImageNet-22k weights of the Swin at 384 pixels.
"""

from codetr import nodes

from .common.recipes import adamw, coco, schedule

model = nodes.co_deformable_detr(nodes.swin("large", drop_path=0.3))
dataloader = coco()
optimizer = adamw(weight_decay=0.05, slower=("backbone", "sampling_offsets"))
train, lr_multiplier = schedule(12, 11, init="")
