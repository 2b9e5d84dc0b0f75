"""The "existing" augmentation of Table 7, that of Swin and ConvNeXt: many scales, half of the time
of a crop, and nothing pasted.
"""

from detectron2.config import LazyCall as L

from d2dense.data import augmentations

from .coco import dataloader, lr_multiplier, optimizer, train

dataloader.train.mapper.augmentations = L(augmentations.detr)(is_train=True)
dataloader.train.copy_paste = None
