"""The tiny model without sharing: plain Cascade R-CNN."""

from .fscascade_tiny_shapes import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.cfs = False
model.roi_heads.loc_head = None
for _predictor in model.roi_heads.box_predictors:
    _predictor.box_input_shape = None
