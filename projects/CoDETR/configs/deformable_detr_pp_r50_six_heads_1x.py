"""Deformable-DETR++ with six different heads beside it (Table 7, K = 6)."""

from codetr import nodes

from .deformable_detr_pp_r50_1x import dataloader, lr_multiplier, model, optimizer, train

nodes.collaborative(model, "faster_rcnn", "atss", "paa", "retinanet", "fcos", "gfl")
