"""Mask2Former on CEDNet-R50-T; not in the paper."""

from .common.trunks import r50_t as _trunk
from .mask2former_cednet_next_t import dataloader, lr_multiplier, model, optimizer, train

model.backbone.trunk = _trunk
model.backbone.trunk.drop_path = 0.0
for _name, _width in {"c2": 64, "c3": 128, "c4": 256, "c5": 384}.items():
    model.pixel_decoder.input_shape[_name].channels = _width
