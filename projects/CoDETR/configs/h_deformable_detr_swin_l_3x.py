"""H-Deformable-DETR on Swin-L with 900 queries, 36 epochs (quoted in Table 4).

Set ``train.init_checkpoint`` to the ImageNet-22k weights of the Swin with windows of 7 at 224
pixels.
"""

from codetr import nodes

from .common.recipes import adamw, coco, schedule

_body = nodes.swin("large", drop_path=0.5)
_body.node.window = 7
model = nodes.h_deformable_detr(_body, num_queries=900)
dataloader = coco()
optimizer = adamw(weight_decay=0.05, slower=("backbone", "sampling_offsets"))
train, lr_multiplier = schedule(36, 30, init="")
