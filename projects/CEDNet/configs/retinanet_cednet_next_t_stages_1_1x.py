"""RetinaNet on CEDNet-NeXt-T in 12 epochs: one stage, all blocks before the
first fusion (Tables 4 and 6).
"""

from .retinanet_cednet_next_t_stages_3_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.trunk.blocks = [[6, 9, 3]]
