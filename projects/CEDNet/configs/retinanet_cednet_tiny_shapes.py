"""A small CEDNet RetinaNet for tests: minutes on a CPU, from scratch, on generated shapes, which
it only starts to learn (benchmarks/cednet_learning.md).
"""

from d2dense.config import detectors

from .common.tiny_shapes import backbone as _backbone
from .common.tiny_shapes import dataloader, lr_multiplier, num_classes, optimizer, train, width

model = detectors.retinanet(backbone=_backbone, num_classes=num_classes, channels=width)
model.head.conv_dims = [width, width]
model.anchor_generator.sizes = [[2 * stride, 3 * stride] for stride in (8, 16, 32, 64, 128)]
model.head.num_anchors = 6
