"""CEDNet-NeXt-T in 100 epochs: two stages, half of the blocks
before the first fusion (Tables 4 and 6).
"""

from .classifier_cednet_next_t_imagenet_100ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.network.trunk.blocks = [[3, 6, 3], [3, 6, 3]]
