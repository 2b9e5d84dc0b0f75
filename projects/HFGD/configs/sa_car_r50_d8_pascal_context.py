"""SA (CAR), the dilated reference model at output stride 8 (Table 5: 50.50 mIoU)."""

from .common.models import SELF_ATTENTION_D8 as _self_attention
from .common.models import resnet50 as _resnet50
from .common.models import segmenter as _segmenter
from .common.pascal_context import CROP as _crop
from .common.pascal_context import NUM_CLASSES as _classes
from .common.pascal_context import TEST_PAD as _pad
from .common.pascal_context import dataloader, lr_multiplier, optimizer, train

_backbone = _resnet50()
_backbone.output_stride = 8
_shapes = {"res2": (256, 4), "res3": (512, 8), "res4": (1024, 8), "res5": (2048, 8)}
model = _segmenter(
    num_classes=_classes,
    crop=_crop,
    test_pad=_pad,
    backbone=_backbone,
    shapes=_shapes,
    **_self_attention,
)
