"""A small Co-Deformable-DETR with ATSS beside it for the generated shapes (K = 1)."""

from codetr import nodes

from .common.tiny_shapes import dataloader, lr_multiplier, optimizer, tiny, train

model = tiny(nodes.co_deformable_detr, "atss")
