"""Deformable-DETR++ on Swin-L with ATSS beside it (Table 3, K = 1)."""

from codetr import nodes

from .deformable_detr_pp_swin_l_1x import dataloader, lr_multiplier, model, optimizer, train

nodes.collaborative(model, "atss")
