"""SemanticFPN, the paper's baseline: no context encoder, no guidance (Table 5: 47.14 mIoU)."""

from .common.models import SEMANTIC_FPN as _semantic_fpn
from .common.models import segmenter as _segmenter
from .common.pascal_context import CROP as _crop
from .common.pascal_context import NUM_CLASSES as _classes
from .common.pascal_context import TEST_PAD as _pad
from .common.pascal_context import dataloader, lr_multiplier, optimizer, train

model = _segmenter(num_classes=_classes, crop=_crop, test_pad=_pad, **_semantic_fpn)
