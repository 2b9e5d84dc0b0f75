"""Pascal Context for ConvNeXts: AdamW, 40,000 iterations of 16 crops of 512 x 512 pixels (their
stem loses a pixel of 513).
"""

from .recipes import adamw, crops, schedule

NUM_CLASSES = 59
CROP = [512, 512]
TEST_PAD = [512, 512]

dataloader = crops(data="pascal_context_sem_seg", size=CROP, color_distortion=True)
optimizer = adamw()
train, lr_multiplier = schedule(40_000)
