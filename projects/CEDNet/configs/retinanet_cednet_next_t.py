"""RetinaNet on CEDNet-NeXt-T with the official recipe.

Set ``train.init_checkpoint`` to an ImageNet checkpoint that tools/convert_checkpoint.py has
converted.
"""

from detectron2.config import LazyCall as L

from cednet import CEDNet
from d2dense.config import detectors

from .common.coco import dataloader, lr_multiplier, optimizer, train
from .common.trunks import next_t as _trunk

model = detectors.retinanet(backbone=L(CEDNet)(trunk=_trunk, size_divisibility=128))
model.backbone.trunk.drop_path = 0.2
