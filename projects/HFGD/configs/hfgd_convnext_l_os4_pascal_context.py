"""HFGD with ConvNeXt-L (Tables 6 and 10: 63.8 mIoU; six scales with flips 64.9)."""

from .common.models import LARGE as _shapes
from .common.models import convnext_large as _convnext_large
from .common.models import segmenter as _segmenter
from .common.pascal_context_adamw import CROP as _crop
from .common.pascal_context_adamw import NUM_CLASSES as _classes
from .common.pascal_context_adamw import TEST_PAD as _pad
from .common.pascal_context_adamw import dataloader, lr_multiplier, optimizer, train

model = _segmenter(
    num_classes=_classes, crop=_crop, test_pad=_pad, backbone=_convnext_large(), shapes=_shapes
)
