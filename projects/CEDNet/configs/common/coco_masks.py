"""The recipe of Mask R-CNN: masks are read and pasted too, and boxes are drawn around what a crop
leaves of them.
"""

from .coco import dataloader, lr_multiplier, optimizer, train

dataloader.train.mapper.use_instance_mask = True
dataloader.train.mapper.recompute_boxes = True
