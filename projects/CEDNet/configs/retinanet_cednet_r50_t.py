"""RetinaNet on CEDNet-R50-T."""

from .common.trunks import r50_t as _trunk
from .retinanet_cednet_next_t import dataloader, lr_multiplier, model, optimizer, train

model.backbone.trunk = _trunk
model.backbone.trunk.drop_path = 0.0
optimizer.params.layer_decay = 1.0
