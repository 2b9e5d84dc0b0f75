"""Deformable-DETR++ with Faster R-CNN, ATSS and PAA beside it (Table 7, K = 3)."""

from codetr import nodes

from .deformable_detr_pp_r50_1x import dataloader, lr_multiplier, model, optimizer, train

nodes.collaborative(model, "faster_rcnn", "atss", "paa")
