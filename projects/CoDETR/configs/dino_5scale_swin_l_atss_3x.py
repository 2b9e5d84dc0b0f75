"""DINO with ATSS beside it and its own loss (Table 3, K = 1)."""

from codetr import nodes

from .dino_5scale_swin_l_3x import dataloader, lr_multiplier, model, optimizer, train

nodes.collaborative(model, "atss", positions=False, features=False)
