"""A small HFGD at output stride 2 that learns the generated shapes in a minute or two on a CPU."""

from .common.tiny_shapes import dataloader, lr_multiplier, optimizer, train
from .common.tiny_shapes import tiny as _tiny

model = _tiny(out_stride=2)
