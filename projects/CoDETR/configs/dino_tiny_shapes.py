"""A small DINO for the generated shapes: the base detector of co_dino_tiny_shapes."""

from codetr import nodes

from .common.tiny_shapes import dataloader, lr_multiplier, optimizer, tiny, train

model = tiny(nodes.dino)
