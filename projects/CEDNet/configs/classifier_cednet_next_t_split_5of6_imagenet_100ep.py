"""CEDNet-NeXt-T in 100 epochs: two stages, five sixths of the blocks
before the first fusion (Table 4).
"""

from .classifier_cednet_next_t_imagenet_100ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.network.trunk.blocks = [[5, 10, 5], [1, 2, 1]]
