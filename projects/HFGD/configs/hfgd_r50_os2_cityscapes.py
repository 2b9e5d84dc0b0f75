"""HFGD at output stride 2 on Cityscapes (Table 8: 79.81 mIoU)."""

from .common.cityscapes import CROP as _crop
from .common.cityscapes import NUM_CLASSES as _classes
from .common.cityscapes import TEST_PAD as _pad
from .common.cityscapes import dataloader, lr_multiplier, optimizer, train
from .common.models import segmenter as _segmenter

model = _segmenter(num_classes=_classes, crop=_crop, test_pad=_pad, out_stride=2)
