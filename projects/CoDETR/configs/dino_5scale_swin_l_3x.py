"""DINO of 5 scales on Swin-L, 36 epochs (Tables 3 and 4, K = 0).

Set ``train.init_checkpoint`` to the ImageNet-22k weights of the Swin at 384 pixels.
"""

from codetr import nodes

from .common.recipes import adamw, coco, schedule

model = nodes.dino(nodes.swin("large", drop_path=0.6))
dataloader = coco()
optimizer = adamw()
train, lr_multiplier = schedule(36, 30, init="")
