"""Mask2Former on CEDNet-NeXt-T with the official recipe; not in the paper.

Set ``train.init_checkpoint`` to an ImageNet checkpoint that tools/convert_checkpoint.py has
converted.
"""

from detectron2.config import LazyCall as L

from cednet import CEDNet
from d2dense.config import detr

from .common.coco_mask2former import dataloader, lr_multiplier, optimizer, train
from .common.trunks import next_t as _trunk

_widths = {"c2": 96, "c3": 192, "c4": 352, "c5": 512}
model = detr.mask2former(
    backbone=L(CEDNet)(trunk=_trunk, out_features=list(_widths)), widths=_widths
)
model.backbone.trunk.drop_path = 0.2
