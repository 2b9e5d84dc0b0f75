"""CEDNet-NeXt-T in 100 epochs: three stages (Tables 4 and 6)."""

from .classifier_cednet_next_t_imagenet import dataloader, model, optimizer
from .common.imagenet_100ep import lr_multiplier, train
