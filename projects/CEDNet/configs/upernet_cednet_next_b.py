"""UperNet on CEDNet-NeXt-B; as in the official recipe, its last stage learns at the full rate."""

from .common.ade20k import dataloader, lr_multiplier, optimizer, train
from .common.ade20k import upernet as _upernet
from .common.trunks import next_b as _trunk

_trunk.layer_count = 7
model = _upernet(_trunk, widths=[128, 256, 448, 704], stages=4, drop_path=0.4)
