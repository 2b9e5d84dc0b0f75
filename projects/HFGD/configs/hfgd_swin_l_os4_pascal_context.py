"""HFGD with Swin-L (Tables 3 and 4: 60.46 mIoU); an ablation, so by SGD."""

from .common.models import LARGE as _shapes
from .common.models import segmenter as _segmenter
from .common.models import swin_large as _swin_large
from .common.pascal_context import CROP as _crop
from .common.pascal_context import NUM_CLASSES as _classes
from .common.pascal_context import TEST_PAD as _pad
from .common.pascal_context import dataloader, lr_multiplier, optimizer, train

model = _segmenter(
    num_classes=_classes, crop=_crop, test_pad=_pad, backbone=_swin_large(), shapes=_shapes
)
optimizer.params.no_decay_names = ["relative_position_bias_table"]
train.max_iter = 40_000
