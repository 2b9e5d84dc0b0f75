"""RetinaNet on CEDNet-NeXt-T with the unpublished decoders ``fpn_convs``."""

from .common.trunks import next_t_fpn_convs as _trunk
from .retinanet_cednet_next_t import dataloader, lr_multiplier, model, optimizer, train

model.backbone.trunk = _trunk
model.backbone.trunk.drop_path = 0.2
