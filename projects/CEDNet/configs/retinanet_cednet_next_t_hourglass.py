"""RetinaNet on CEDNet-NeXt-T with Hourglass-style decoders."""

from .common.trunks import next_t_hourglass as _trunk
from .retinanet_cednet_next_t import dataloader, lr_multiplier, model, optimizer, train

model.backbone.trunk = _trunk
model.backbone.trunk.drop_path = 0.2
