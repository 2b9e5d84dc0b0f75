"""CEDNet-NeXt-T in 100 epochs: four stages (Table 6)."""

from .classifier_cednet_next_t_imagenet_100ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.network.trunk.blocks = [[1, 4, 1], [1, 4, 1], [1, 4, 1], [1, 4, 1]]
