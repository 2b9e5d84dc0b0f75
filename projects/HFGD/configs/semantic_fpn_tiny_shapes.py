"""The small SemanticFPN that ``hfgd_tiny_shapes`` compares with."""

from .common.models import SEMANTIC_FPN as _semantic_fpn
from .common.tiny_shapes import dataloader, lr_multiplier, optimizer, train
from .common.tiny_shapes import tiny as _tiny

model = _tiny(**_semantic_fpn)
