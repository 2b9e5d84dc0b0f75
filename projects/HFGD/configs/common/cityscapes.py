"""Cityscapes, 19 classes: SGD, 30,000 iterations of 16 crops of 513 x 1025 pixels."""

from .recipes import crops, schedule, sgd

NUM_CLASSES = 19
CROP = [513, 1025]
TEST_PAD = [1025, 2049]

dataloader = crops(data="cityscapes_fine_sem_seg", size=CROP)
optimizer = sgd()
train, lr_multiplier = schedule(30_000)
