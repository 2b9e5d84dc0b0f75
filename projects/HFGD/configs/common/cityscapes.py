"""Cityscapes, 19 classes: SGD, 30,000 iterations of 16 crops of 513 x 1025 pixels."""

from .pascal_context import dataloader, lr_multiplier, optimizer, train

NUM_CLASSES = 19
CROP = [513, 1025]

dataloader.train.dataset.names = "cityscapes_fine_sem_seg_train"
dataloader.train.mapper.augmentations.crop_size = CROP
dataloader.test.dataset.names = "cityscapes_fine_sem_seg_val"
