"""RetinaNet on CEDNet-CSwin-T."""

from .common.trunks import cswin_t as _trunk
from .retinanet_cednet_next_t import dataloader, lr_multiplier, model, optimizer, train

model.backbone.trunk = _trunk
model.backbone.trunk.drop_path = 0.2
