"""HFGD at output stride 4 on ADE20K, which the paper does not have."""

from .common.ade20k import CROP as _crop
from .common.ade20k import NUM_CLASSES as _classes
from .common.ade20k import dataloader, lr_multiplier, optimizer, train
from .common.models import segmenter as _segmenter

model = _segmenter(num_classes=_classes, crop=_crop)
