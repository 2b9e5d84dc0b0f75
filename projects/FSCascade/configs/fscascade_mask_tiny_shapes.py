"""The tiny FSCascade with a mask branch."""

from .common.mask_branch import mask_branch
from .fscascade_tiny_shapes import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.update(mask_branch)
model.roi_heads.mask_head.input_shape.channels = 32
model.roi_heads.mask_head.conv_dims = [32, 32, 32]
model.roi_heads.mask_pooler.sampling_ratio = model.roi_heads.box_pooler.sampling_ratio
dataloader.train.mapper.use_instance_mask = True
