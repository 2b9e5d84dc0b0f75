"""UperNet on ConvNeXt-B, trained as on CEDNet.

``model.backbone.pretrained=true`` starts from timm's ImageNet weights.
"""

from .common.ade20k import dataloader, lr_multiplier, optimizer, train
from .common.ade20k import upernet_convnext as _upernet

model = _upernet("convnext_base", width=128, drop_path=0.4)
