"""ADE20K, 150 classes, which the paper does not have: SGD, 80,000 iterations of 16 crops of 513 x
513 pixels.
"""

from .recipes import crops, schedule, sgd

NUM_CLASSES = 150
CROP = [513, 513]

dataloader = crops(data="ade20k_sem_seg", size=CROP)
optimizer = sgd()
train, lr_multiplier = schedule(80_000)
