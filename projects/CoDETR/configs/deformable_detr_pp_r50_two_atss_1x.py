"""Deformable-DETR++ with ATSS twice beside it (supplement)."""

from codetr import nodes

from .deformable_detr_pp_r50_1x import dataloader, lr_multiplier, model, optimizer, train

nodes.collaborative(model, "atss", "atss")
