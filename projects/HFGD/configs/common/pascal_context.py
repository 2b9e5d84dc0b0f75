"""Pascal Context, 59 classes: SGD, 30,000 iterations of 16 crops of 513 x 513 pixels."""

from .recipes import crops, schedule, sgd

NUM_CLASSES = 59
CROP = [513, 513]
TEST_PAD = [513, 513]  # images have at most 500 pixels a side

dataloader = crops(data="pascal_context_sem_seg", size=CROP)
optimizer = sgd()
train, lr_multiplier = schedule(30_000)
