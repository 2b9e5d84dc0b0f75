"""RetinaNet on CEDNet-NeXt-T with U-Net-style decoders."""

from .common.trunks import next_t_unet as _trunk
from .retinanet_cednet_next_t import dataloader, lr_multiplier, model, optimizer, train

model.backbone.trunk = _trunk
model.backbone.trunk.drop_path = 0.2
