"""DINO with Faster R-CNN and ATSS beside it and its own loss (Table 3, K = 2)."""

from codetr import nodes

from .dino_5scale_swin_l_3x import dataloader, lr_multiplier, model, optimizer, train

nodes.collaborative(model, "faster_rcnn", "atss", positions=False, features=False)
