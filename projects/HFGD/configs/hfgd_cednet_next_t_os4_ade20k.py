"""HFGD at output stride 4 on CEDNet-NeXt-T, ADE20K: 80,000 iterations with the recipe of ConvNeXts
(in neither paper).

Set ``train.init_checkpoint`` to an ImageNet checkpoint that tools/convert_checkpoint.py has
converted.
"""

from d2dense import model_zoo

from .common.ade20k import NUM_CLASSES as _classes
from .common.models import segmenter as _segmenter
from .common.recipes import adamw as _adamw
from .common.recipes import crops as _crops
from .common.recipes import schedule as _schedule

_SHAPES = {"c2": (96, 4), "c3": (192, 8), "c4": (352, 16), "c5": (512, 32)}

model = _segmenter(
    num_classes=_classes,
    crop=[512, 512],
    backbone=model_zoo.get_config("CEDNet/upernet_cednet_next_t").model.backbone,
    shapes=_SHAPES,
    in_features=list(_SHAPES),
)
model.backbone.out_features = list(_SHAPES)
dataloader = _crops(data="ade20k_sem_seg", size=[512, 512], color_distortion=True)
optimizer = _adamw()
train, lr_multiplier = _schedule(80_000)
