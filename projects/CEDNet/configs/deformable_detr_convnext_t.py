"""Deformable DETR on ConvNeXt-T; the fourth level is a strided convolution of its last map.

``model.backbone.pretrained=true`` starts from timm's ImageNet weights. The recipe is that of the
official CEDNet-R50-T; the one of the paper's ConvNeXts is not known.
"""

from detectron2.config import LazyCall as L

from d2dense.config import detr
from d2dense.modeling import TimmBackbone

from .common.coco_detr import dataloader, lr_multiplier, train
from .common.coco_detr import plain_adamw as _plain_adamw

_widths = {"res3": 192, "res4": 384, "res5": 768}
model = detr.deformable_detr(
    backbone=L(TimmBackbone)(
        name="convnext_tiny", out_features=list(_widths), out_norm="LN", drop_path_rate=0.4
    ),
    in_features=list(_widths),
    neck=detr.channel_mapper(widths=_widths),
)
optimizer = _plain_adamw()
