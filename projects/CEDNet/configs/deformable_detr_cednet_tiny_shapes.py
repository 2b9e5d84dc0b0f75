"""A small CEDNet Deformable DETR for the generated shapes, for tests and trials on a CPU. It takes
many times the steps of the other detectors to learn: 800 show that it runs, not what it can do.
"""

from d2dense.config import detr

from .common.tiny_shapes import backbone as _backbone
from .common.tiny_shapes import dataloader, lr_multiplier, num_classes, optimizer, train, width

_backbone.out_features = ["p3", "p4", "p5", "p6"]
model = detr.deformable_detr(
    backbone=_backbone,
    in_features=["p3", "p4", "p5", "p6"],
    num_classes=num_classes,
    channels=width,
)
for _part in (model.encoder, model.decoder):
    _part.update(layers=2, heads=4, feedforward=64, dropout=0.0)
model.queries.num_queries = 50
dataloader.train.dataset.filter_empty = False
optimizer.params.lr_multipliers = {"sampling_offsets": 0.1, "reference_points": 0.1}
train.clip_gradients = {"enabled": True, "clip_type": "full_model", "clip_value": 0.1}
