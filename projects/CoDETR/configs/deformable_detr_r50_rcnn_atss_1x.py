"""Deformable DETR with Faster R-CNN and ATSS beside it, 12 epochs (Table 2, K = 2)."""

from codetr import nodes

from .deformable_detr_r50_1x import dataloader, lr_multiplier, model, optimizer, train

nodes.collaborative(model, "faster_rcnn", "atss")
