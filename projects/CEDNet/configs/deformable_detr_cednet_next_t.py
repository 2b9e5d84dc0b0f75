"""Deformable DETR on CEDNet-NeXt-T with the official recipe.

Set ``train.init_checkpoint`` to an ImageNet checkpoint that tools/convert_checkpoint.py has
converted.
"""

from detectron2.config import LazyCall as L

from cednet import CEDNet
from d2dense.config import detr

from .common.coco_detr import dataloader, lr_multiplier, optimizer, train
from .common.trunks import next_t as _trunk

_levels = ["p3", "p4", "p5", "p6"]
model = detr.deformable_detr(
    backbone=L(CEDNet)(trunk=_trunk, out_features=_levels, size_divisibility=128),
    in_features=_levels,
)
model.backbone.trunk.drop_path = 0.2
