"""Conditional DETR with Faster R-CNN and ATSS beside it, 36 epochs (Table 2, K = 2)."""

from codetr import nodes

from .conditional_detr_r50_c5_3x import dataloader, lr_multiplier, model, optimizer, train

nodes.collaborative(model, "faster_rcnn", "atss", points=True)
