"""Deformable DETR with RetinaNet beside it, 36 epochs (Table 8)."""

from codetr import nodes

from .deformable_detr_r50_3x import dataloader, lr_multiplier, model, optimizer, train

nodes.collaborative(model, "retinanet")
