"""UperNet on CEDNet-NeXt-T with the official recipe.

Set ``train.init_checkpoint`` to an ImageNet checkpoint that tools/convert_checkpoint.py has
converted.
"""

from .common.ade20k import dataloader, lr_multiplier, optimizer, train
from .common.ade20k import upernet as _upernet
from .common.trunks import next_t as _trunk

model = _upernet(_trunk, widths=[96, 192, 352, 512], stages=3, drop_path=0.2)
