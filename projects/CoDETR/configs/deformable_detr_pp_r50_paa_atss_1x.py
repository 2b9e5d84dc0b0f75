"""Deformable-DETR++ with PAA and ATSS beside it (Table 7, K = 2)."""

from codetr import nodes

from .deformable_detr_pp_r50_1x import dataloader, lr_multiplier, model, optimizer, train

nodes.collaborative(model, "paa", "atss")
