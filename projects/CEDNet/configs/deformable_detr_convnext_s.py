"""Deformable DETR on ConvNeXt-S."""

from .deformable_detr_convnext_t import dataloader, lr_multiplier, model, optimizer, train

model.backbone.name = "convnext_small"
model.backbone.drop_path_rate = 0.6
