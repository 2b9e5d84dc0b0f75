"""HFGD with ConvNeXt-L on Cityscapes (Table 9: 83.1 mIoU; six scales with flips 83.8)."""

from .common.cityscapes_adamw import CROP as _crop
from .common.cityscapes_adamw import NUM_CLASSES as _classes
from .common.cityscapes_adamw import dataloader, lr_multiplier, optimizer, train
from .common.models import LARGE as _shapes
from .common.models import convnext_large as _convnext_large
from .common.models import segmenter as _segmenter

model = _segmenter(num_classes=_classes, crop=_crop, backbone=_convnext_large(), shapes=_shapes)
