"""RetinaNet on CEDNet-NeXt-T with the "existing" augmentation of Table 7."""

from .common.coco_multiscale import dataloader, lr_multiplier, optimizer, train
from .retinanet_cednet_next_t import model
