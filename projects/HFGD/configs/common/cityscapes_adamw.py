"""Cityscapes for ConvNeXts: AdamW, 60,000 iterations of 16 crops of 512 x 1024 pixels; whole images
of 1024 x 2048 fit the backbone as they are.
"""

from .recipes import adamw, crops, schedule

NUM_CLASSES = 19
CROP = [512, 1024]

dataloader = crops(data="cityscapes_fine_sem_seg", size=CROP, color_distortion=True)
optimizer = adamw()
train, lr_multiplier = schedule(60_000)
