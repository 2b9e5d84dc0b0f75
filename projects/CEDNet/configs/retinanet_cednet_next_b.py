"""RetinaNet on CEDNet-NeXt-B."""

from .common.trunks import next_b as _trunk
from .retinanet_cednet_next_t import dataloader, lr_multiplier, model, optimizer, train

model.backbone.trunk = _trunk
model.backbone.trunk.drop_path = 0.3
