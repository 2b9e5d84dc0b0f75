"""A small Deformable-DETR++ for the generated shapes (K = 0)."""

from codetr import nodes

from .common.tiny_shapes import dataloader, lr_multiplier, optimizer, tiny, train

model = tiny(nodes.deformable_detr_plus_plus)
