"""Deformable-DETR++ with ATSS six times beside it (supplement)."""

from codetr import nodes

from .deformable_detr_pp_r50_1x import dataloader, lr_multiplier, model, optimizer, train

nodes.collaborative(model, *["atss"] * 6)
