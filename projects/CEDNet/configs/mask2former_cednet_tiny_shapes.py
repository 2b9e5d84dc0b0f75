"""A small CEDNet Mask2Former for the generated shapes, for tests and trials on a CPU."""

from d2dense.config import detr

from .common.tiny_shapes import backbone as _backbone
from .common.tiny_shapes import dataloader, lr_multiplier, num_classes, optimizer, train, width

_widths = {"c2": 24, "c3": 32, "c4": 48, "c5": 64}
_backbone.out_features = list(_widths)
model = detr.mask2former(
    backbone=_backbone, widths=_widths, num_classes=num_classes, channels=width
)
model.pixel_decoder.update(layers=1, heads=4, feedforward=64, norm_groups=8)
model.decoder.update(layers=3, heads=4, feedforward=64, num_queries=30)
model.criterion.num_points = 1000
dataloader.train.mapper.use_instance_mask = True
dataloader.train.mapper.instance_mask_format = "bitmask"
dataloader.train.mapper.recompute_boxes = True
train.clip_gradients = {"enabled": True, "clip_type": "full_model", "clip_value": 1.0}
