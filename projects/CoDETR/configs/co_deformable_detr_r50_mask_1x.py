"""Co-Deformable-DETR with Mask R-CNN and ATSS beside it, 12 epochs."""

from codetr import nodes

from .co_deformable_detr_r50_1x import dataloader, lr_multiplier, optimizer, train

model = nodes.co_deformable_detr(None, "mask_rcnn", "atss")
dataloader.train.mapper.use_instance_mask = True
