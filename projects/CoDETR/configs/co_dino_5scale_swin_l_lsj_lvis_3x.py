"""Co-DINO on Swin-L for LVIS, 36 epochs of large-scale jitter at 1280 pixels, federated loss (Table
6).

Set ``train.init_checkpoint`` to the ImageNet-22k weights of the Swin at 384 pixels.
"""

from codetr import nodes

from .common.recipes import LVIS_IMAGES, adamw, federated, lvis, schedule, squares

model = nodes.co_dino(nodes.swin("large", drop_path=0.5))
squares(federated(model), 1280)
dataloader = lvis(size=1280)
optimizer = adamw()
train, lr_multiplier = schedule(36, 30, init="", images=LVIS_IMAGES)
