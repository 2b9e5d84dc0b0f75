"""COCO-Stuff-164k, 171 classes: AdamW, 40,000 iterations of 16 crops of 512 x 512 pixels; tested on
images of their own size.
"""

from .recipes import adamw, crops, schedule

NUM_CLASSES = 171
CROP = [512, 512]

dataloader = crops(data="coco_stuff_164k_sem_seg", size=CROP, color_distortion=True)
optimizer = adamw()
train, lr_multiplier = schedule(40_000)
