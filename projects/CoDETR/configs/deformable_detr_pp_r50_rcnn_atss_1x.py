"""Deformable-DETR++ with Faster R-CNN and ATSS beside it (Tables 3, 7 and 11, K = 2)."""

from codetr import nodes

from .deformable_detr_pp_r50_1x import dataloader, lr_multiplier, model, optimizer, train

nodes.collaborative(model, "faster_rcnn", "atss")
