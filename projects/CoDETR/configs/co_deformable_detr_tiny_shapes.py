"""A small Co-Deformable-DETR for the generated shapes (K = 2)."""

from codetr import nodes

from .common.tiny_shapes import dataloader, lr_multiplier, optimizer, tiny, train

model = tiny(nodes.co_deformable_detr)
