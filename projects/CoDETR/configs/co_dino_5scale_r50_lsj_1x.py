"""Co-DINO++ on ResNet-50, 12 epochs of large-scale jitter at 1024 pixels (Table 4)."""

from codetr import nodes

from .common.recipes import adamw, jittered, schedule, squares

model = squares(nodes.co_dino(), 1024)
dataloader = jittered(size=1024)
optimizer = adamw()
train, lr_multiplier = schedule(12, 11)
