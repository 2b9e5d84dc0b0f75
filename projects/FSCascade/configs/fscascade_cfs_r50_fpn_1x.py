"""Classification feature sharing only."""

from .fscascade_r50_fpn_1x import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.loc_head = None
for _predictor in model.roi_heads.box_predictors:
    _predictor.box_input_shape = None
