"""HFGD with ConvNeXt-L on COCO-Stuff-164k (Table 7: 49.0 mIoU; six scales with flips 49.4)."""

from .common.coco_stuff_adamw import CROP as _crop
from .common.coco_stuff_adamw import NUM_CLASSES as _classes
from .common.coco_stuff_adamw import dataloader, lr_multiplier, optimizer, train
from .common.models import LARGE as _shapes
from .common.models import convnext_large as _convnext_large
from .common.models import segmenter as _segmenter

model = _segmenter(num_classes=_classes, crop=_crop, backbone=_convnext_large(), shapes=_shapes)
