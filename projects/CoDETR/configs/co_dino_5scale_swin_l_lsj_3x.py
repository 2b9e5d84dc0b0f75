"""Co-DINO++ on Swin-L, 36 epochs of large-scale jitter at 1280 pixels (Table 4).

Set ``train.init_checkpoint`` to the ImageNet-22k weights of the Swin at 384 pixels.
"""

from codetr import nodes

from .common.recipes import adamw, jittered, schedule, squares

model = squares(nodes.co_dino(nodes.swin("large", drop_path=0.5)), 1280)
dataloader = jittered(size=1280)
optimizer = adamw()
train, lr_multiplier = schedule(36, 30, init="")
