"""RetinaNet on ConvNeXt-T with FPN and the "existing" augmentation of Table 7."""

from .common.coco_multiscale import dataloader, lr_multiplier, optimizer, train
from .retinanet_convnext_t_fpn import model
